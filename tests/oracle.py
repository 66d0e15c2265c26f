"""The dictionary model: what a table does, in plain Python, the oracle of both engines.

Written from the contracts of :mod:`dynamicemb.kernels` and the page on the design, not from the kernels. Python's
integers do the 64-bit arithmetic, dictionaries are the tables, and every rule is in the most direct form there is: the
place of a bucket, for instance, is found by undoing one doubling after the other. First values of rows and optimizers
are in :mod:`tests.oracle_values`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Optional

MASK = 2**64 - 1
MIX_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
MIX_LAST_SHIFT = 31
GAMMA = 0x9E3779B97F4A7C15

CHUNKS_PER_TABLE = 32
CHUNK_BITS = 40
FOUND, INSERTED, REPLACED, REFUSED = 0, 1, 2, 3


def signed(bits: int) -> int:
    """The int64 with these 64 bits."""
    bits &= MASK
    return bits - 2**64 if bits >= 2**63 else bits


def mix64(key: int) -> int:
    """The mixed key, unsigned."""
    x = (key + GAMMA) & MASK
    for shift, factor in MIX_STEPS:
        x = ((x ^ (x >> shift)) * factor) & MASK
    return x ^ (x >> MIX_LAST_SHIFT)


def _without_xorshift(x: int, shift: int) -> int:
    original = x
    for _ in range(64 // shift):
        original = x ^ (original >> shift)
    return original


def unmix64(mixed: int) -> int:
    """The key whose mixed form is ``mixed``: for keys that collide on purpose."""
    x = _without_xorshift(mixed, MIX_LAST_SHIFT)
    for shift, factor in reversed(MIX_STEPS):
        x = _without_xorshift((x * pow(factor, -1, 2**64)) & MASK, shift)
    return signed(x - GAMMA)


def digest(key: int) -> int:
    """1 to 255, from the low 16 bits of the mixed key."""
    return (mix64(key) % 65536 * 255 // 65536) + 1


def owner(key: int, world_size: int) -> int:
    return mix64(key) * world_size // 2**64


def position(key: int, world_size: int) -> int:
    """Where the key lies inside its owner's range, 64 bits."""
    return mix64(key) * world_size % 2**64


def colliding_keys(rank: int, world_size: int, fraction: float, low_bits: Optional[int], count: int) -> list[int]:
    """Distinct keys of one owner and one bucket of any table of up to 2**20 buckets.

    ``fraction`` (0 to 1) says where in the owner's range the bucket lies. With ``low_bits`` (16 bits) they share the
    digest as well; without, they have many.
    """
    first = (rank * 2**64 + int(fraction * (2**64 - 2**40)) + 2**39) // world_size // 65536 * 65536
    stride = 65536 if low_bits is not None else 65536 + 257
    return [unmix64(first + (low_bits or 0) + stride * number) for number in range(count)]


@dataclass(frozen=True)
class Distinct:
    """A batch's distinct (table, key) in ascending (owner, table, mixed key), and where each of them occurs."""

    keys: list[int]
    tables: list[int]
    inverse: list[int]
    order: list[int]
    offsets: list[int]


def dedup(keys: Sequence[int], tables: Sequence[int], world_size: int) -> Distinct:
    positions: dict[tuple[int, int], list[int]] = {}
    for place, (table, key) in enumerate(zip(tables, keys)):
        positions.setdefault((table, key), []).append(place)
    pairs = sorted(positions, key=lambda pair: (owner(pair[1], world_size), pair[0], mix64(pair[1])))
    entry = {pair: number for number, pair in enumerate(pairs)}
    offsets = [0]
    for pair in pairs:
        offsets.append(offsets[-1] + len(positions[pair]))
    return Distinct(
        keys=[key for _, key in pairs],
        tables=[table for table, _ in pairs],
        inverse=[entry[table, key] for table, key in zip(tables, keys)],
        order=[place for pair in pairs for place in positions[pair]],
        offsets=offsets,
    )


@dataclass(frozen=True)
class Outcome:
    """What :meth:`TableModel.insert` did with one key."""

    status: int
    slot: int
    evicted_key: Optional[int] = None
    evicted_score: Optional[int] = None


class TableModel:
    """One table on one rank: dictionaries from a key to its place and its score, and back.

    ``index`` is the table's place in its group: slot handles count the chunks of the tables before it.
    """

    def __init__(
        self, max_rows: int, init_rows: int, bucket_capacity: int, world_size: int = 1, rank: int = 0, index: int = 0
    ) -> None:
        self.bucket_capacity = bucket_capacity
        self.world_size = world_size
        self.rank = rank
        self.index = index
        self.max_buckets = max(1, -(-max_rows // bucket_capacity))
        wanted_buckets = min(max(1, -(-init_rows // bucket_capacity)), self.max_buckets)
        self.levels = 0
        self.shift = 0
        while (
            self.shift < CHUNKS_PER_TABLE - 1
            and self.buckets > 1
            and self._buckets_at(self.shift + 1) >= wanted_buckets
        ):
            self.shift += 1
        self.place_of: dict[int, tuple[int, int]] = {}
        self.score_of: dict[int, int] = {}
        self.key_in: dict[int, dict[int, int]] = {}

    def _buckets_at(self, shift: int) -> int:
        return -(-self.max_buckets // 2**shift)

    @property
    def buckets(self) -> int:
        return self._buckets_at(self.shift)

    @property
    def capacity(self) -> int:
        """Slots that there are now."""
        return self.buckets * self.bucket_capacity

    def bucket(self, key: int) -> int:
        """The bucket at full size, shifted down to today's."""
        return (position(key, self.world_size) * self.max_buckets // 2**64) >> self.shift

    def handle(self, bucket: int, slot: int) -> int:
        """The handle of a slot, by undoing doublings: bucket 2b lies where b did, 2b + 1 in the chunk that came."""
        level = self.levels
        while level > 0 and bucket % 2 == 0:
            bucket, level = bucket // 2, level - 1
        chunk, place = (level, bucket // 2) if level > 0 else (0, bucket)
        return ((self.index * CHUNKS_PER_TABLE + chunk) << CHUNK_BITS) | (place * self.bucket_capacity + slot)

    def slot(self, key: int) -> int:
        """The handle of a key's slot, -1 if it is absent."""
        return self.handle(*self.place_of[key]) if key in self.place_of else -1

    def find(self, keys: Iterable[int], scores: Optional[Sequence[int]] = None, accumulate: bool = False) -> list[int]:
        """Handles of distinct keys; with ``scores``, those that are there take or add theirs."""
        slots = []
        for number, key in enumerate(keys):
            assert owner(key, self.world_size) == self.rank
            slots.append(self.slot(key))
            if scores is not None and key in self.place_of:
                before = self.score_of[key] if accumulate else 0
                self.score_of[key] = signed(before + scores[number])
        return slots

    def insert(self, keys: Sequence[int], scores: Sequence[int]) -> list[Outcome]:
        """Places the absent ones of distinct ``keys``, in their order; every key of the list is safe from eviction."""
        batch = set(keys)
        outcomes = []
        for key, score in zip(keys, scores):
            if key in self.place_of:
                outcomes.append(Outcome(FOUND, self.slot(key)))
                continue
            outcomes.append(self._place(key, score, batch))
        return outcomes

    def _place(self, key: int, score: int, batch: set[int]) -> Outcome:
        bucket = self.bucket(key)
        taken = self.key_in.setdefault(bucket, {})
        empty = [slot for slot in range(self.bucket_capacity) if slot not in taken]
        victims = [(self.score_of[other], other, slot) for slot, other in taken.items() if other not in batch]
        if empty:
            self._store(key, bucket, empty[0], score)
            return Outcome(INSERTED, self.slot(key))
        if not victims:
            return Outcome(REFUSED, -1)
        evicted_score, evicted_key, slot = min(victims)
        del self.place_of[evicted_key], self.score_of[evicted_key]
        self._store(key, bucket, slot, score)
        return Outcome(REPLACED, self.slot(key), evicted_key, evicted_score)

    def _store(self, key: int, bucket: int, slot: int, score: int) -> None:
        self.place_of[key] = (bucket, slot)
        self.key_in[bucket][slot] = key
        self.score_of[key] = score

    @property
    def can_grow(self) -> bool:
        return self.shift > 0

    def grow(self) -> None:
        """One doubling: every entry keeps its slot in the bucket that its key now has."""
        assert self.can_grow
        self.shift -= 1
        self.levels += 1
        self.place_of = {key: (self.bucket(key), slot) for key, (_, slot) in self.place_of.items()}
        self.key_in = {}
        for key, (bucket, slot) in self.place_of.items():
            self.key_in.setdefault(bucket, {})[slot] = key

    def occupied(self) -> dict[int, tuple[int, int, int]]:
        """Slot handle -> (digest, key, score) of every entry, as memory must show it."""
        return {self.slot(key): (digest(key), key, score) for key, score in self.score_of.items()}
