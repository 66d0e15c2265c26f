"""Notes of changes on the CPU. Each range of the batch counts for itself how many keys gave way before it."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch

from dynamicemb.kernels.hashing.cpu import chunk_of, offset_of
from dynamicemb.kernels.insert import Insertion
from dynamicemb.kernels.numba_support import inline, kernel, parallel_for
from dynamicemb.kernels.tally import TALLY_TILE
from dynamicemb.kernels.views import EvictionView, KeyStatus, TouchView, UniqueKeys

_REPLACED = np.int8(KeyStatus.REPLACED)
_TILE = np.int64(TALLY_TILE)
#: In place of touches that are not noted.
_NOWHERE, _NO_BASES = np.empty(0, np.int32), np.empty(0, np.int64)


@inline
def _touch(start, stop, slots, now, touches, bases):
    for u in range(start, stop):
        if slots[u] >= 0:
            touches[bases[chunk_of(slots[u])] + offset_of(slots[u])] = now


@kernel
def _note_touches(start, stop, slots, tick, touches, bases):
    _touch(start, stop, slots, np.int32(tick[0]), touches, bases)


@kernel
def _note(
    start, stop, tables, slots, status, evicted_keys, evicted, tick, count, ring_keys, ring_tables, ring_ticks, touches,
    bases,
):  # fmt: skip
    now, size = np.int32(tick[0]), ring_keys.size
    if touches.size > 0:
        _touch(start, stop, slots, now, touches, bases)
    total = evicted.sum()
    if total == 0:
        return
    first_tile = start // _TILE
    number = evicted[:first_tile].sum()
    for u in range(first_tile * _TILE, stop):
        if status[u] == _REPLACED:
            if u >= start and number >= total - size:
                place = (count[0] - total + number) % size
                ring_keys[place], ring_tables[place], ring_ticks[place] = evicted_keys[u], tables[u], now
            number += 1


def note(
    unique: UniqueKeys,
    slots: torch.Tensor,
    insertion: Insertion,
    evicted: torch.Tensor,
    log: EvictionView,
    touches: Optional[TouchView],
) -> None:
    ticks, bases = (_NOWHERE, _NO_BASES) if touches is None else (touches.ticks.numpy(), touches.bases.numpy())
    parallel_for(
        _note, slots.numel(), unique.tables.numpy(), slots.numpy(), insertion.status.numpy(),
        insertion.evicted_keys.numpy(), evicted.numpy(), log.tick.numpy(), log.count.numpy(), log.keys.numpy(),
        log.tables.numpy(), log.ticks.numpy(), ticks, bases,
    )  # fmt: skip


def note_touches(unique: UniqueKeys, slots: torch.Tensor, tick: torch.Tensor, touches: TouchView) -> None:
    parallel_for(
        _note_touches, slots.numel(), slots.numpy(), tick.numpy(), touches.ticks.numpy(), touches.bases.numpy()
    )
