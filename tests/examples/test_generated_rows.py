"""The generated log: the same for the same seed, whatever is read of it; ids that drift; labels that follow the ids."""

from __future__ import annotations

import pytest
import torch
from generated_rows import CHUNK_ROWS, LIFETIME_ROWS, SHAPES, generate
from rows import Rows

#: A feature of every row whose ids are neither few nor rare.
MIDDLE = next(place for place, shape in enumerate(SHAPES) if 300 < shape.vocabulary < 1000 and not shape.null_share)


def _equal(left: Rows, right: Rows) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("labels", "dense", "ids", "present"))


def test_a_row_depends_on_seed_and_number_alone():
    rows = generate(20_000, seed=3).read(0, 20_000)
    assert _equal(rows, generate(20_000, seed=3).read(0, 20_000))
    assert _equal(rows[5000:9000], generate(20_000, seed=3).read(5000, 9000))
    assert _equal(rows[:9000], generate(9000, seed=3).read(0, 9000))
    assert not _equal(rows, generate(20_000, seed=4).read(0, 20_000))


@pytest.mark.parametrize("num_rows", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1])
def test_length(num_rows):
    source = generate(num_rows, seed=0)
    assert source.num_rows == num_rows == len(source.read(0, num_rows))


def test_shape_of_the_real_log():
    rows = generate(50_000, seed=0).read(0, 50_000)
    assert 0.03 < rows.labels.mean() < 0.3
    assert rows.ids.min() >= 0
    assert rows.ids.max() < 2**40
    assert rows.ids.max() > 2**39
    assert (rows.ids[~rows.present] == 0).all()
    null_share = 1 - rows.present.float().mean(dim=0)
    assert ((null_share - torch.tensor([shape.null_share for shape in SHAPES])).abs() < 0.02).all()
    assert (rows.dense >= 0).all()
    assert rows.dense.max() > 100 * rows.dense.median()


def test_ids_follow_a_power_law():
    rows = generate(50_000, seed=0).read(0, 50_000)
    largest = max(range(26), key=lambda feature: SHAPES[feature].vocabulary)
    counts = rows.ids[rows.present[:, largest], largest].unique(return_counts=True)[1].sort(descending=True).values
    assert len(counts) > 5_000
    # A twentieth of the distinct ids makes up more than a third of the rows, and most ids are seen once.
    assert counts[: len(counts) // 20].sum() > counts.sum() / 3
    assert counts.median() == 1


def test_ids_drift():
    source = generate(2 * LIFETIME_ROWS, seed=0)
    start, soon, later = (source.read(first, first + 5_000) for first in (0, 5_000, LIFETIME_ROWS + 10_000))

    def share_known(rows: Rows) -> float:
        return torch.isin(rows.ids[:, MIDDLE], start.ids[:, MIDDLE]).float().mean().item()

    assert share_known(soon) > 0.9
    assert share_known(later) < 0.1


def test_labels_depend_on_ids():
    rows = generate(100_000, seed=0).read(0, 100_000)
    ids, index, counts = rows.ids[:, MIDDLE].unique(return_inverse=True, return_counts=True)
    clicks = torch.zeros(len(ids)).index_add_(0, index, rows.labels)
    rates = clicks[counts > 500] / counts[counts > 500]
    assert len(rates) > 10
    # Ids without an effect would differ by the noise of their counts only: at most 0.016.
    assert rates.std() > 0.03
