"""What a training lookup has changed, noted for checkpoints of changes: keys that gave way, slots that were touched."""

from __future__ import annotations

from typing import Optional

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.insert import Insertion
from dynamicemb.kernels.views import EvictionView, TouchView, UniqueKeys

__all__ = ["note", "note_touches"]


def note(
    unique: UniqueKeys,
    slots: torch.Tensor,
    insertion: Insertion,
    evicted: torch.Tensor,
    log: EvictionView,
    touches: Optional[TouchView],
) -> None:
    """Notes a lookup that :func:`~dynamicemb.kernels.tally.tally` has counted in ``log``, with its time.

    The keys that gave way take the numbers up to ``log.count``, in the order of the batch: that order, and so all that
    is noted, depends on nothing but the batch. Of a batch that evicts more than the ring holds, the last are kept.

    Args:
        unique: the batch.
        slots: int64 [U], where the keys are, −1 for refused ones.
        insertion: what became of them.
        evicted: as ``tally`` returned it.
        log: the evictions; their ring changes, not their count.
        touches: the time of each slot's last touch, which changes; None where scores tell it. Does not synchronise.
    """
    engine = implementation(__name__, slots.device)
    engine.note(unique, slots, insertion, evicted, log, touches)


def note_touches(unique: UniqueKeys, slots: torch.Tensor, tick: torch.Tensor, touches: TouchView) -> None:
    """Notes that ``slots``, int64 [U], those that are not negative, have been touched at the time ``tick``, int64 [1].

    Does not synchronise.
    """
    implementation(__name__, slots.device).note_touches(unique, slots, tick, touches)
