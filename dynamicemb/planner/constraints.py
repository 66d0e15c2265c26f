"""The flag that makes a table dynamic, and what the other constraints may say beside it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
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


def _unplannable_by_torchrec(field: str) -> Any:
    """A field of torchrec's constraints that torchrec's own enumerator may not read of a table that shall be dynamic.

    That enumerator does not know the flag and would plan a static table. Ours never lets it ask about a dynamic table,
    so its question alone says that a class has been forgotten. Everybody else reads the field as usual.
    """

    def read(self: DynamicEmbParameterConstraints) -> Any:
        reader = sys._getframe(1)
        if reader.f_globals.get("__name__") == EmbeddingEnumerator.__module__:
            self._refuse_torchrecs_enumerator(reader.f_locals.get("name"))
        return self.__dict__[field]

    def write(self: DynamicEmbParameterConstraints, value: Any) -> None:
        self.__dict__[field] = value

    return property(read, write)


@dataclass
class DynamicEmbParameterConstraints(ParameterConstraints):
    """TorchRec's constraints of a table and the flag that makes the table dynamic.

    Sharding type and compute kernel need not be given. If they are, ``sharding_types`` must include ``row_wise`` and
    ``compute_kernels`` must include ``customized_kernel``.

    A table with the flag is never planned as a static one: TorchRec's own enumerator raises
    :class:`~dynamicemb.errors.ConfigError` when it meets such constraints.

    Attributes:
        use_dynamicemb: whether the table is dynamic. If not, it is TorchRec's own in every respect.
        dynamicemb_options: its options; None: all defaults. Options without the flag are refused when planning.
    """

    use_dynamicemb: Optional[bool] = False
    dynamicemb_options: Optional[DynamicEmbTableOptions] = None

    # Not annotated, so they stay torchrec's fields, at their places in the constructor.
    sharding_types = _unplannable_by_torchrec("sharding_types")
    compute_kernels = _unplannable_by_torchrec("compute_kernels")

    def __hash__(self) -> int:
        return self._digest(super().__hash__())

    def _persistent_hash(self, *args: Any) -> int:
        # What torchrec 1.9 calls in place of __hash__ for plans that are kept.
        return self._digest(super()._persistent_hash(*args))

    def _digest(self, hash_of_base: int) -> int:
        # As in the base class, the same in every process, because plans are kept under it.
        content = f"{hash_of_base} {bool(self.use_dynamicemb)} {self.dynamicemb_options!r}"
        return int(hashlib.sha256(content.encode()).hexdigest(), 16)

    def _refuse_torchrecs_enumerator(self, table: object) -> None:
        name = table if isinstance(table, str) else "?"
        check_constraint(name, self)
        if _is_dynamic(self):
            raise ConfigError(
                f"table '{name}' has use_dynamicemb=True and is being planned by torchrec's own planner, which would "
                "make it a static table; use dynamicemb.planner.DynamicEmbeddingShardingPlanner with these constraints"
            )


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
            take; a flag that is not one, or on a class that does not know it; options without the flag; or a table
            that is not dynamic and may use only the kernel of dynamic tables.
    """
    if constraint is None:
        return
    _check_flag(table, constraint)
    if _is_dynamic(constraint):
        _check_dynamic(table, constraint)
    elif constraint.compute_kernels and set(constraint.compute_kernels) == {DYNAMIC_KERNEL}:
        raise ConfigError(
            f"table '{table}': compute_kernels={constraint.compute_kernels} is the kernel of dynamic tables, and the "
            "table is not dynamic; use DynamicEmbParameterConstraints(use_dynamicemb=True), or remove compute_kernels"
        )


def _check_flag(table: str, constraint: ParameterConstraints) -> None:
    flag, options = (getattr(constraint, name, None) for name in ("use_dynamicemb", "dynamicemb_options"))
    if not isinstance(flag, (bool, type(None))):
        raise ConfigError(f"table '{table}': use_dynamicemb={flag!r} is a {type(flag).__name__}; use True or False")
    if options is not None and not isinstance(options, DynamicEmbTableOptions):
        raise ConfigError(
            f"table '{table}': dynamicemb_options={options!r} is a {type(options).__name__}; use DynamicEmbTableOptions"
        )
    if not isinstance(constraint, DynamicEmbParameterConstraints):
        if flag or options is not None:
            raise ConfigError(
                f"table '{table}': its constraints are a {type(constraint).__name__}, which has no flag "
                "use_dynamicemb; use DynamicEmbParameterConstraints(use_dynamicemb=True)"
            )
    elif options is not None and not flag:
        raise ConfigError(
            f"table '{table}': dynamicemb_options are given without use_dynamicemb=True, and would not be read; "
            "set use_dynamicemb=True, or remove dynamicemb_options"
        )


def _check_dynamic(table: str, constraint: ParameterConstraints) -> None:
    kernels = constraint.compute_kernels
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
