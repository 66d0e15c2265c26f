"""A dynamic table's entry in the sharding plan."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Optional

from torchrec.distributed.types import ParameterSharding
from torchrec.distributed.utils import add_params_from_parameter_sharding
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType

from dynamicemb.errors import ConfigError
from dynamicemb.options import DynamicEmbTableOptions

__all__ = ["DynamicEmbParameterSharding", "sharded_by_dynamicemb"]

# Whether the sharder that is at work knows dynamic tables.
_sharder_knows_dynamic_tables: ContextVar[bool] = ContextVar("_sharder_knows_dynamic_tables", default=False)


@contextmanager
def sharded_by_dynamicemb() -> Iterator[None]:
    """Inside it, torchrec's sharding code asks on behalf of dynamicemb's sharded collection."""
    token = _sharder_knows_dynamic_tables.set(True)
    try:
        yield
    finally:
        _sharder_knows_dynamic_tables.reset(token)


@dataclass
class DynamicEmbParameterSharding(ParameterSharding):
    """TorchRec's description of a table's sharding and the resolved options of a dynamic table. It can be pickled.

    Attributes:
        dynamicemb_options: with ``dim``, ``embedding_dtype``, ``max_capacity``, ``init_capacity`` and the bounds of the
            initializers filled in (see :func:`dynamicemb.planner.capacity.resolve_options`).
        table, num_embeddings, data_type: name, size and type of the table that was planned; None: not known. Another
            one is refused when the plan is carried out.
    """

    dynamicemb_options: DynamicEmbTableOptions = field(kw_only=True)
    table: Optional[str] = field(default=None, kw_only=True)
    num_embeddings: Optional[int] = field(default=None, kw_only=True)
    data_type: Optional[DataType] = field(default=None, kw_only=True)

    @classmethod
    def of(
        cls, sharding: ParameterSharding, options: DynamicEmbTableOptions, config: BaseEmbeddingConfig
    ) -> DynamicEmbParameterSharding:
        """``sharding`` with ``options`` added, for the table that ``config`` describes."""
        values = {entry.name: getattr(sharding, entry.name) for entry in dataclasses.fields(ParameterSharding)}
        return cls(
            **values,
            dynamicemb_options=options,
            table=config.name,
            num_embeddings=config.num_embeddings,
            data_type=config.data_type,
        )

    @property
    def planned_ranks(self) -> Optional[int]:
        """Ranks that the table is divided over; None if the entry does not say."""
        shards = getattr(self.sharding_spec, "shards", None)
        if shards is not None:
            return len(shards)
        return None if self.ranks is None else len(self.ranks)

    def get_additional_fused_params(self) -> dict[str, Any]:
        """What torchrec merges into the fused parameters of a table with a customized kernel.

        Raises:
            ConfigError: torchrec asks on behalf of a sharder that does not know dynamic tables.
        """
        asker = sys._getframe(1).f_globals.get("__name__")
        if asker == add_params_from_parameter_sharding.__module__ and not _sharder_knows_dynamic_tables.get():
            raise ConfigError(
                f"the plan makes table '{self.table or '?'}' dynamic, and torchrec's own sharder, which does not know "
                "dynamic tables, is sharding its collection; put dynamicemb.shard.DynamicEmbeddingCollectionSharder() "
                "among the sharders"
            )
        return {"dynamicemb_options": self.dynamicemb_options}
