"""A click log that is computed instead of stored: the shape of the Criteo log, ids that drift, labels that follow them.

Ids of a feature: a *place* is drawn from a power law over the feature's vocabulary. At any time one id stands in each
place, a hash of (seed, feature, place, generation) in a space of 2**40, and the next generation takes over every
``LIFETIME_ROWS`` rows, in each place at its own time. Popularity keeps its law while the ids behind it are replaced for
ever, which is what wears out a vocabulary that was collected yesterday.

Labels: every id has an effect on the log-odds, a hash of the id, so a model can learn it only from rows with that id.

A row depends on (seed, its number) alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rows import CATEGORICAL, DENSE, Chunk, Rows, RowSource

#: Rows that are computed together.
CHUNK_ROWS = 8_192
#: Rows after which an id is replaced.
LIFETIME_ROWS = 150_000
ID_BITS = 40


@dataclass(frozen=True)
class FeatureShape:
    """How the ids of one feature are distributed."""

    vocabulary: int
    exponent: float
    null_share: float
    weight: float


def _shapes() -> tuple[FeatureShape, ...]:
    """Vocabularies from 4 to 2 million ids; four features that the log often lacks; effects of unequal weight."""
    count = len(CATEGORICAL)
    vocabularies = np.geomspace(4, 2_000_000, count).astype(int)
    # A fixed order that mixes small and large vocabularies, as in the real log.
    vocabularies = vocabularies[[(7 * feature) % count for feature in range(count)]]
    often_null = {"c14", "c16", "c17", "c23"}
    return tuple(
        FeatureShape(
            vocabulary=int(vocabulary),
            exponent=1.2,
            null_share=0.4 if name in often_null else 0.0,
            # Few ids would move the share of clicks as a whole when one of them is replaced.
            weight=0.2 if vocabulary < 100 else 1.0,
        )
        for name, vocabulary in zip(CATEGORICAL, vocabularies, strict=True)
    )


SHAPES = _shapes()
#: Standard deviation of the sum of the ids' effects on the log-odds.
SIGNAL = 1.8
#: Log-odds of a row whose effects cancel: with SIGNAL, about one label in seven is 1.
BIAS = -3.0
#: Standard deviation of the dense inputs' effect on the log-odds.
DENSE_SIGNAL = 0.4


def generate(num_rows: int, seed: int) -> RowSource:
    """A log of ``num_rows`` rows."""
    return RowSource(
        [
            Chunk(
                min(CHUNK_ROWS, num_rows - first),
                functools.partial(_rows, seed, first, min(CHUNK_ROWS, num_rows - first)),
            )
            for first in range(0, num_rows, CHUNK_ROWS)
        ]
    )


def _rows(seed: int, first_row: int, count: int) -> Rows:
    # A chunk is always drawn whole, so that the length of the log does not change its rows.
    random = np.random.Generator(np.random.Philox(key=[seed % 2**64, first_row]))
    times = np.arange(first_row, first_row + CHUNK_ROWS, dtype=np.uint64)
    ids = np.empty((CHUNK_ROWS, len(CATEGORICAL)), np.int64)
    present = np.empty((CHUNK_ROWS, len(CATEGORICAL)), np.bool_)
    log_odds = np.full(CHUNK_ROWS, BIAS)
    scale = SIGNAL / np.sqrt(sum(shape.weight**2 * (1 - shape.null_share) for shape in SHAPES))
    for feature, shape in enumerate(SHAPES):
        places = _power_law(random.random(CHUNK_ROWS), shape)
        ids[:, feature] = _ids(seed, feature, places, times)
        present[:, feature] = random.random(CHUNK_ROWS) >= shape.null_share
        log_odds += np.where(present[:, feature], scale * shape.weight * _effects(ids[:, feature]), 0.0)
    # Heavy-tailed counts, a tenth of them missing (0); the first four say something about the label.
    strength = random.normal(size=(CHUNK_ROWS, len(DENSE)))
    dense = np.floor(np.exp(1.0 + 1.3 * strength)) * (random.random(strength.shape) >= 0.1)
    log_odds += DENSE_SIGNAL * strength[:, :4].sum(axis=1) / 2.0
    labels = random.random(CHUNK_ROWS) < 1.0 / (1.0 + np.exp(-log_odds))
    rows = Rows(
        torch.from_numpy(labels.astype(np.float32)),
        torch.from_numpy(dense.astype(np.float32)),
        torch.from_numpy(ids * present),
        torch.from_numpy(present),
    )
    return rows[:count]


def _power_law(uniform: np.ndarray, shape: FeatureShape) -> np.ndarray:
    """Places 0 to vocabulary - 1 with density ``(place + 1) ** -exponent``: the inverted distribution function."""
    power = 1.0 - shape.exponent
    value = (1.0 - uniform * (1.0 - float(shape.vocabulary + 1) ** power)) ** (1.0 / power)
    return np.minimum(value.astype(np.int64) - 1, shape.vocabulary - 1)


def _ids(seed: int, feature: int, places: np.ndarray, times: np.ndarray) -> np.ndarray:
    hashed = _hashed(places.astype(np.uint64) ^ _hashed(np.uint64((seed * 64 + feature) % 2**64)))
    generation = (times + hashed % np.uint64(LIFETIME_ROWS)) // np.uint64(LIFETIME_ROWS)
    return (_hashed(hashed + generation) >> np.uint64(64 - ID_BITS)).astype(np.int64)


def _effects(ids: np.ndarray) -> np.ndarray:
    """One number for each id, uniform with mean 0 and variance 1."""
    unit = (_hashed(ids.astype(np.uint64)) >> np.uint64(11)).astype(np.float64) / 2**53
    return (2.0 * unit - 1.0) * np.sqrt(3.0)


def _hashed(words: Any) -> Any:
    """A uint64 array or number through the output function of SplitMix64 (Steele, Lea and Flood, 2014), a bijection."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))
