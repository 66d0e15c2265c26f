"""Sums over the entries of a batch that belong to one key.

Floats are added in float32, in an order that both engines keep to. A key's rows, in batch order, are cut into blocks of
:data:`BLOCK_ROWS`. A whole block is summed on its own, from zero, row after row; the key's sum starts from zero, takes
the sums of its whole blocks in order, then what rows are left, one after the other. So the rows of a frequent key can
be added up side by side, and rounding errors grow more slowly. The optimizers' updates sum gradients in this way too.
"""

from __future__ import annotations

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import UniqueKeys

__all__ = ["BLOCK_ROWS", "segment_sum"]

#: Rows of a key that are summed on their own before they are added to its total.
BLOCK_ROWS = 128


def segment_sum(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    """Sums the rows that belong to each distinct key: in float32 for floats, in blocks as above; in int64 for integers.

    Args:
        values: float32, float16 or bfloat16 [N, D], or int64 [N].
        unique: of the same batch.

    Returns:
        float32 [U, D], or int64 [U]; entries past ``unique.count`` are undefined. Does not synchronise.
    """
    return implementation(__name__, values.device).segment_sum(values, unique)
