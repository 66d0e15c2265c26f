"""Costs that were known before this package was measured: from another machine of two cores, two threads, dim 64.

Quotients are expected from these alone, so that both of their sides belong to one machine.
"""

from __future__ import annotations

from dynamicemb.kernels.layout import OptimizerKind

__all__ = [
    "FBGEMM_MILLISECONDS",
    "MCH_IDS_PER_SECOND",
    "REASON",
    "TORCHREC_MILLISECONDS",
    "backward_milliseconds",
    "forward_milliseconds",
    "sort_milliseconds",
]

#: Where they come from, for the results.
REASON = "from another machine of two cores"
#: What follows is for this many ids a step.
IDS = 65_536
#: A step of fbgemm's table with a million rows: lookup, backward, update.
FBGEMM_MILLISECONDS = {OptimizerKind.SGD: 144.0, OptimizerKind.ROWWISE_ADAGRAD: 164.0}
#: The lookup alone, which is little more than a copy of each id's row.
FBGEMM_FORWARD_MILLISECONDS = 10.0
#: A step of TorchRec's row-wise collection on two ranks.
TORCHREC_MILLISECONDS = 200.0
#: Lookups through TorchRec's managed collisions with a million rows.
MCH_IDS_PER_SECOND = 0.2e6
#: ``torch.unique``.
SORTED_IDS_PER_SECOND = 9e6
#: An untuned loop over the digests of a bucket of 128.
FOUND_IDS_PER_SECOND = 6e6


def sort_milliseconds(ids: float) -> float:
    """Deduplication of a batch."""
    return 1e3 * ids / SORTED_IDS_PER_SECOND


def forward_milliseconds(ids: int, unique: float) -> float:
    """A dynamic table's lookup: a sort, a probe for each distinct id, a copy of each id's row."""
    copy = FBGEMM_FORWARD_MILLISECONDS * ids / IDS
    return sort_milliseconds(ids) + 1e3 * unique / FOUND_IDS_PER_SECOND + copy


def backward_milliseconds(ids: int, unique: float) -> float:
    """Its update: each gradient read, each distinct row read and written, at the price of the lookup's copies."""
    return FBGEMM_FORWARD_MILLISECONDS * (ids + 2 * unique) / 2 / IDS
