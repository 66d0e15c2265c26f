"""The flag that makes a table dynamic, and what the other constraints may say beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType

from dynamicemb.errors import ConfigError
from dynamicemb.options import DynamicEmbTableOptions

__all__ = [
    "DYNAMIC_KERNEL",
    "DYNAMIC_SHARDING_TYPE",
    "DynamicEmbParameterConstraints",
    "check_constraint",
    "dynamic_options",
]

#: The one sharding type of dynamic tables: every rank owns a range of hashed ids.
DYNAMIC_SHARDING_TYPE: str = ShardingType.ROW_WISE.value
#: The compute kernel by which torchrec leaves a table to a plugin.
DYNAMIC_KERNEL: str = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value


@dataclass
class DynamicEmbParameterConstraints(ParameterConstraints):
    """TorchRec's constraints of a table and the flag that makes the table dynamic.

    Sharding type and compute kernel need not be given. If they are, ``sharding_types`` must include ``row_wise`` and
    ``compute_kernels`` must include ``customized_kernel``.

    Attributes:
        use_dynamicemb: whether the table is dynamic. If not, it is TorchRec's own in every respect.
        dynamicemb_options: its options; None: all defaults. Not read for a table that is not dynamic.
    """

    use_dynamicemb: Optional[bool] = False
    dynamicemb_options: Optional[DynamicEmbTableOptions] = None

    def __hash__(self) -> int:
        return self._digest(super().__hash__())

    def _persistent_hash(self, *args: Any) -> int:
        # What torchrec 1.9 calls in place of __hash__ for plans that are kept.
        return self._digest(super()._persistent_hash(*args))

    def _digest(self, hash_of_base: int) -> int:
        # As in the base class, the same in every process, because plans are kept under it.
        content = f"{hash_of_base} {bool(self.use_dynamicemb)} {self.dynamicemb_options!r}"
        return int(hashlib.sha256(content.encode()).hexdigest(), 16)


def _is_dynamic(constraint: Optional[ParameterConstraints]) -> bool:
    return isinstance(constraint, DynamicEmbParameterConstraints) and bool(constraint.use_dynamicemb)


def dynamic_options(
    constraints: Optional[Mapping[str, ParameterConstraints]],
) -> dict[str, Optional[DynamicEmbTableOptions]]:
    """Options, as the user gave them, of every table that ``constraints`` make dynamic."""
    return {
        name: constraint.dynamicemb_options
        for name, constraint in (constraints or {}).items()
        if isinstance(constraint, DynamicEmbParameterConstraints) and _is_dynamic(constraint)
    }


def check_constraint(table: str, constraint: Optional[ParameterConstraints]) -> None:
    """Check that the parts of one table's constraint can be honoured together.

    Raises:
        ConfigError: a dynamic table with a sharding type, a compute kernel or a storage that dynamic tables do not
            take, or a table that is not dynamic and may use only the kernel of dynamic tables.
    """
    if constraint is None:
        return
    kernels = constraint.compute_kernels
    if not _is_dynamic(constraint):
        if kernels and set(kernels) == {DYNAMIC_KERNEL}:
            raise ConfigError(
                f"table '{table}': compute_kernels={kernels} is the kernel of dynamic tables, and the table is not "
                "dynamic; use DynamicEmbParameterConstraints(use_dynamicemb=True), or remove compute_kernels"
            )
        return
    if constraint.sharding_types and DYNAMIC_SHARDING_TYPE not in constraint.sharding_types:
        raise ConfigError(
            f"table '{table}': sharding_types={constraint.sharding_types} does not include '{DYNAMIC_SHARDING_TYPE}', "
            "the only sharding type of dynamic tables; add it, or remove sharding_types"
        )
    if kernels and DYNAMIC_KERNEL not in kernels:
        raise ConfigError(
            f"table '{table}': compute_kernels={kernels} does not include '{DYNAMIC_KERNEL}', the only compute kernel "
            "of dynamic tables; add it, or remove compute_kernels"
        )
    for name in ("key_value_params", "use_virtual_table"):
        if getattr(constraint, name, None):
            raise ConfigError(
                f"table '{table}': {name}={getattr(constraint, name)} belongs to torchrec's own virtual tables and "
                "cannot be combined with use_dynamicemb=True; remove one of the two"
            )
    options = getattr(constraint, "dynamicemb_options", None)
    if options is not None and not isinstance(options, DynamicEmbTableOptions):
        raise ConfigError(
            f"table '{table}': dynamicemb_options={options!r} is a {type(options).__name__}; use DynamicEmbTableOptions"
        )
