"""A dynamic table's entry in the sharding plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torchrec.distributed.types import ParameterSharding

from dynamicemb.options import DynamicEmbTableOptions

__all__ = ["DynamicEmbParameterSharding"]


@dataclass
class DynamicEmbParameterSharding(ParameterSharding):
    """TorchRec's description of a table's sharding and the resolved options of a dynamic table. It can be pickled.

    Attributes:
        dynamicemb_options: with ``dim``, ``embedding_dtype``, ``max_capacity``, ``init_capacity`` and the bounds of the
            initializers filled in (see :func:`dynamicemb.planner.capacity.resolve_options`).
    """

    dynamicemb_options: DynamicEmbTableOptions = field(kw_only=True)

    @classmethod
    def of(cls, sharding: ParameterSharding, options: DynamicEmbTableOptions) -> DynamicEmbParameterSharding:
        """``sharding`` with ``options`` added."""
        values = {entry.name: getattr(sharding, entry.name) for entry in dataclasses.fields(ParameterSharding)}
        return cls(**values, dynamicemb_options=options)

    def get_additional_fused_params(self) -> dict[str, Any]:
        """What torchrec merges into the fused parameters of a table with a customized kernel."""
        return {"dynamicemb_options": self.dynamicemb_options}
