"""What the benchmarks share: spreads, turns, ids, names of machines."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from figures import Spread, Target
from host import MemoryCosts, OtherLoad, device_slug
from output import number, warning
from timing import Laps, interleaved, milliseconds, ratio
from workload import PowerLaw


def test_spread_is_the_median_and_two_percentiles() -> None:
    assert Spread.of([float(value) for value in range(11)]) == Spread(5.0, 1.0, 9.0, 11)


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(2.0, True, True), (1.9, True, False), (2.0, False, True), (2.1, False, False)]
)
def test_targets_include_their_limit(value: float, at_least: bool, met: bool) -> None:
    assert Target(2.0, at_least).met_by(value) is met


def test_contenders_take_turns_in_alternating_order() -> None:
    calls: list[str] = []

    def contender(name: str, seconds: float) -> tuple[str, object]:
        def step(index: int) -> Laps:
            calls.append(f"{name}{index}")
            return {"forward": seconds, "backward": seconds * index}

        return name, step

    laps = interleaved(dict([contender("a", 0.002), contender("b", 0.001)]), rounds=2, warm_up=1)
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert milliseconds(laps["a"]).median == pytest.approx(5.0)
    assert milliseconds(laps["a"], "backward").median == pytest.approx(3.0)
    assert ratio(laps["a"], laps["b"]) == Spread(2.0, 2.0, 2.0, 2)


def test_power_law_draws_popular_ids_often_and_all_ids_in_range() -> None:
    law = PowerLaw(1000)
    ids = law.draw(20_000)
    assert int(ids.min()) >= 0 and int(ids.max()) < 1000
    counts = ids.bincount(minlength=1000).sort(descending=True).values
    # The share of [1, 2) under the density x**-1.05 on [1, 1001).
    assert counts[0].item() / 20_000 == pytest.approx((1 - 2**-0.05) / (1 - 1001**-0.05), rel=0.1)
    assert torch.equal(law.every_id().sort().values, torch.arange(1000))


def test_popularity_is_the_same_for_every_seed_and_draws_are_not() -> None:
    first, second = PowerLaw(1000, seed=1), PowerLaw(1000, seed=2)
    assert torch.equal(first.every_id(), second.every_id())
    assert not torch.equal(first.draw(100), second.draw(100))


@pytest.mark.parametrize(
    ("model", "cores", "slug"),
    [
        ("Intel(R) Xeon(R) Processor", 2, "xeon-2core"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", 4, "xeon-platinum-8488c-4core"),
        ("AMD EPYC 7763 64-Core Processor", 8, "epyc-7763-8core"),
        ("", 1, "cpu-1core"),
    ],
)
def test_machines_are_named_after_their_processor(model: str, cores: int, slug: str) -> None:
    assert device_slug(model, cores) == slug


@pytest.mark.parametrize(
    ("value", "text"), [(17.0, "17"), (0.12345, "0.123"), (1.2345, "1.23"), (12.345, "12.3"), (1234.5678, "1,235")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_memory_costs_grow_with_what_is_moved() -> None:
    costs = MemoryCosts(random_bytes_per_s=1e9, sorted_ids_per_s=1e6)
    assert costs.forward_seconds(1000, 0, 256) == pytest.approx(1e-3 + 256e-6)
    assert costs.backward_seconds(1000, 100, 256, 16) == pytest.approx((256_000 + 200 * 272) * 1e-9)


def test_own_work_is_not_the_load_of_others() -> None:
    # Others may be busy, such as workers with other tests: what they take is what is left of the machine.
    cores, idle, begun, others = os.cpu_count() or 1, _idle_seconds(), time.perf_counter(), OtherLoad()
    start = time.process_time()
    while time.process_time() - start < 0.3:
        pass
    seconds = time.perf_counter() - begun
    found = others.cores()
    busy = cores - (_idle_seconds() - idle) / seconds
    # A clock that ticks every 10 ms, on each core.
    assert found < busy - 0.3 / seconds + cores * 0.02 / seconds + 0.05


def _idle_seconds() -> float:
    """Time that the cores of the machine have spent idle or waiting for a disk."""
    idle, waiting = (int(ticks) for ticks in Path("/proc/stat").read_text().split(maxsplit=6)[4:6])
    return (idle + waiting) / os.sysconf("SC_CLK_TCK")


def test_a_busy_machine_is_mentioned() -> None:
    assert warning(0.05) == ""
    assert "kept 1.3 cores busy" in warning(1.26)
