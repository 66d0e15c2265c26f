"""Bytes of each kernel, against numbers worked out by hand, by simulation, or by others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu import traffic
from gpu.limits import Ceilings
from gpu.traffic import SortWork, Traffic

from dynamicemb.kernels.layout import OptimizerKind, RowLayout

WIDE = RowLayout(128, torch.float32, OptimizerKind.SGD)


def test_a_sort_reads_keys_once_and_moves_pairs_eight_times() -> None:
    assert SortWork(10, key_bytes=8, value_bytes=8).num_bytes == 10 * (8 + 8 * 2 * 16)
    assert SortWork(10, key_bytes=4, value_bytes=4).num_bytes == 10 * (4 + 4 * 2 * 8)


def test_dedup_moves_each_input_and_output_once_and_sorts_prefixes() -> None:
    """Tensors of the batch's length: keys, tables, prefixes twice, positions twice, marks twice, keys again, and what
    comes out; and three numbers for each distinct id, of which the key is read and written."""
    work = traffic.dedup(1000, 300)
    assert work.streamed_bytes == 1000 * (8 + 4 + 4 + 4 + 8 + 8 + 1 + 8 + 1 + 8 + 4 + 8) + 300 * (8 + 4 + 8)
    assert work.sorts == (SortWork(1000, key_bytes=4, value_bytes=8),)
    assert work.num_bytes == work.streamed_bytes + 1000 * (4 + 4 * 2 * 12)


def test_wide_rows_stream_and_narrow_ones_take_whole_sectors() -> None:
    assert traffic.rows_read(10, 512) == Traffic(5120)
    assert traffic.rows_read(10, 516) == Traffic(5440)
    assert traffic.rows_read(10, 16) == Traffic(accesses={32: 10})
    assert traffic.rows_read(10, 96) == Traffic(accesses={96: 10})


def test_gather_reads_distinct_rows_and_writes_all() -> None:
    assert traffic.gather(1000, 300, WIDE).num_bytes == 1000 * 8 + 300 * 8 + (1000 + 300) * 512
    half = RowLayout(128, torch.bfloat16, OptimizerKind.ADAM)  # neither the state nor float32 is read
    work = traffic.gather(1000, 300, half, through_inverse=False)
    assert work.num_bytes == 1000 * 8 + 1000 * 512 + 300 * 256


@pytest.mark.parametrize(
    ("kind", "row_bytes"),
    [
        (OptimizerKind.SGD, 512),
        (OptimizerKind.ADAGRAD, 1024),
        (OptimizerKind.ROWWISE_ADAGRAD, 528 + 16),  # whole sectors
        (OptimizerKind.ADAM, 1536),
    ],
)
def test_update_reads_gradients_and_changes_rows_with_their_state(kind: OptimizerKind, row_bytes: int) -> None:
    work = traffic.update(1000, 300, RowLayout(128, torch.float32, kind))
    assert work.num_bytes == 1000 * 8 + 300 * 20 + 1000 * 512 + 2 * 300 * row_bytes


def test_an_earlier_estimate_came_to_the_same_times() -> None:
    """By arithmetic of its own, before there was this module: 0.21, 0.28 and 0.50 ms at 75 to 85 % of 4.3 TB/s."""
    ids, unique, adam = 1_048_570, 350_000, RowLayout(128, torch.float32, OptimizerKind.ADAM)
    for work, milliseconds in (
        (traffic.gather(ids, unique, WIDE), 0.21),
        (traffic.update(ids, unique, WIDE), 0.28),
        (traffic.update(ids, unique, adam), 0.50),
    ):
        fastest, slowest = (1e3 * work.num_bytes / (share * 4.3e12) for share in (0.85, 0.75))
        assert 0.97 * fastest < milliseconds < 1.03 * slowest


def test_touched_buckets_are_those_that_a_draw_touches() -> None:
    drawn = np.random.default_rng(0).integers(0, 5000, 8000)
    assert traffic.touched_buckets(8000, 5000) == pytest.approx(np.unique(drawn).size, rel=0.01)
    assert traffic.touched_buckets(1, 1e6) == pytest.approx(1, rel=1e-5)


def test_find_reads_a_line_and_the_keys_behind_matching_digests() -> None:
    random = np.random.default_rng(0)
    lines, digests = random.integers(1, 256, (20_000, 128)), random.integers(1, 256, 20_000)
    lines[:, 64:] = 0  # half full
    false_matches = (lines == digests[:, None]).sum() / 20_000
    work = traffic.find(1000, hits=700, load=0.5)
    assert work.accesses[128] == 1000
    assert work.accesses[32] == pytest.approx(700 + 1000 * false_matches, rel=0.02)
    assert work.streamed_bytes == 1000 * 20
    touched = traffic.find(1000, hits=700, load=0.5, touched=400, touch=True)
    assert touched.accesses[128] == 400
    assert touched.accesses[32] == work.accesses[32] + 700
    assert touched.streamed_bytes == 1000 * 20 + 700


def test_insert_without_misses_only_looks() -> None:
    assert traffic.insert(1000, 0, buckets=10).num_bytes == 1000 * 20


def test_insert_reads_a_bucket_for_its_misses() -> None:
    work = traffic.insert(1000, 1000, buckets=1e9, evicted=1000)
    assert work.streamed_bytes == pytest.approx(1000 * (20 + 9 + 16) + 1000 * 128 * 9, rel=1e-5)
    assert work.accesses[32] == 4000


def test_fill_writes_whole_rows_of_new_keys() -> None:
    layout = RowLayout(128, torch.float32, OptimizerKind.ADAM)
    assert traffic.fill(1000, 10, layout).num_bytes == 1000 + 10 * (20 + 1536)


def test_a_step_is_the_sum_of_its_kernels() -> None:
    forward = traffic.forward(1000, 300, 20, WIDE, tables=2, buckets=50, load=0.5)
    parts = [
        traffic.dedup(1000, 300),
        traffic.find(300, 280, 0.5, touched=traffic.touched_buckets(300, 50), touch=True),
        traffic.insert(300, 20, 50),
        traffic.fill(300, 20, WIDE),
        traffic.tally(300, 2),
        traffic.gather(1000, 300, WIDE),
    ]
    assert forward.num_bytes == pytest.approx(sum(part.num_bytes for part in parts))
    assert traffic.static_backward(1000, 300, WIDE).num_bytes == pytest.approx(
        traffic.backward(1000, 300, WIDE).num_bytes - traffic.begin_update(1000).num_bytes + 1000 * 100
    )


def test_evaluation_reads_equal_ids_once() -> None:
    work = traffic.evaluation(1000, 300, WIDE, load=0.5)
    assert work.accesses[128] == 300
    assert work.streamed_bytes == 1000 * 20 + 1000 * 8 + (1000 + 300) * 512


def test_an_initializer_reads_slots_again_and_writes_missing_rows() -> None:
    """At any number of missing keys; where there are none, a hundredth of an evaluation's bytes."""
    assert traffic.fill_missing(1000, 0, WIDE).num_bytes == 1000 * 8
    half = RowLayout(128, torch.bfloat16, OptimizerKind.ADAM)  # rows have left the table and are of float32
    assert traffic.fill_missing(1000, 30, half).num_bytes == 1000 * 8 + 30 * (8 + 4 + 512)
    ids, unique = 1_048_570, 350_000
    for dim, most in ((128, 1.02), (32, 1.05), (8, 1.1)):
        layout = RowLayout(dim, torch.float32, OptimizerKind.SGD)
        zeros = traffic.evaluation(ids, unique, layout, load=0.6).num_bytes
        assert 1 < (zeros + traffic.fill_missing(ids, 0, layout).num_bytes) / zeros < most


def test_rows_of_a_tensor_keep_their_dtype() -> None:
    assert traffic.gather_rows(1000, 300, row_bytes=256).num_bytes == 1000 * 8 + (1000 + 300) * 256
    assert traffic.gather_rows(1000, 300, row_bytes=40).accesses == {64: 300}


def test_no_expectation_before_the_copy_is_measured() -> None:
    assert Ceilings().seconds(Traffic(1.0)) is None
    assert Ceilings().copy_share(1.0, 1.0) is None


def test_expected_time_is_streams_and_accesses_and_sorts() -> None:
    ceilings = Ceilings(copy_bytes_per_s=1000.0)
    work = Traffic(500, {32: 10}) + traffic.sort(4)
    assert ceilings.seconds(work) == pytest.approx((500 + 320 + 4 * 100) / 1000)  # nothing else is known yet
    ceilings.random_reads_per_s = {1e6: {32: 50.0}, 1e9: {32: 20.0}}
    ceilings.sort_seconds = {4: {2: 1.0, 6: 3.0}}
    assert ceilings.seconds(work) == pytest.approx(0.5 + 10 / 50 + 2.0)
    assert ceilings.seconds(work, array_bytes=1e8) == pytest.approx(0.5 + 10 / 20 + 2.0)
    assert ceilings.seconds(work, array_bytes=1e12) == pytest.approx(0.5 + 10 / 20 + 2.0)
    assert ceilings.seconds(traffic.sort(12)) == pytest.approx(6.0)
    assert ceilings.seconds(traffic.sort(12, key_bytes=8)) == pytest.approx(12 * 264 / 1000)
    assert ceilings.copy_share(500, 1.0) == 0.5
