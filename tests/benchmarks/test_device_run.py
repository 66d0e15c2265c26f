"""What is compiled ahead of a first run on a GPU is all that the run will launch.

The benchmarks and tests run in their small sizes, on the CPU engine. Whatever they ask of it is asked of the Triton
engine as well, on meta tensors, and the launches that this would take are compared with those that were derived.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("in Triton's interpreter launches are of another kind", allow_module_level=True)

from ahead_of_time.device_run import device_run
from ahead_of_time.launches import Launch, recorded_launches
from gpu.random_reads import random_read_kernel
from gpu.topic import run_topic

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.kernels import engine
from dynamicemb.kernels.layout import OptimizerKind
from tests.benchmarks.pretended import context
from tests.gpu import test_steady_state
from tests.gpu.cases import FEW, MATRIX, Case
from tests.gpu.life import live
from tests.gpu.scale import TOY
from tests.kernels.aot import kernels

_module = engine._module


def _on_meta(value: Any) -> Any:
    """Arguments of an operation without what is in them."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _on_meta(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


class _BothEngines:
    """An operation of the CPU engine, which calls that of the Triton engine before."""

    def __init__(self, operation: str) -> None:
        self._cpu, self._triton = _module(operation, "cpu"), _module(operation, "triton")

    def __getattr__(self, name: str) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            getattr(self._triton, name)(
                *map(_on_meta, arguments), **{key: _on_meta(value) for key, value in options.items()}
            )
            return getattr(self._cpu, name)(*arguments, **options)

        return run


@contextmanager
def launches_on_a_gpu() -> Iterator[list[Launch]]:
    """Collects what the operations of the CPU engine inside the block would launch on a GPU."""

    def module(operation: str, name: str) -> Any:
        return _BothEngines(operation) if name == "cpu" else _module(operation, name)

    with mock.patch.object(engine, "_module", module), recorded_launches() as launches:
        yield launches


@pytest.fixture(scope="module")
def derived() -> set[Launch]:
    """For the small sizes."""
    with recorded_launches() as launches:
        device_run(dry=True)
    return set(launches)


def test_every_kernel_is_launched() -> None:
    """Of all that the package can launch, the part that benchmarks and tests do."""
    with recorded_launches() as launches:
        device_run()
    assert {launch.kernel for launch in launches} == {*kernels(), random_read_kernel.__name__}
    assert {1024, 128, 4} <= {launch.setting.get("DIM") for launch in launches}


@pytest.mark.slow
@pytest.mark.parametrize("topic", ["dedup", "kernels", "table", "step"])
def test_topics(topic: str, derived: set[Launch]) -> None:
    here = context()
    with launches_on_a_gpu() as launches:
        outcome = run_topic(importlib.import_module(f"gpu.{topic}").topic(here), here.device, time.perf_counter() + 999)
    assert outcome.findings is not None and not outcome.errors
    assert len(launches) >= 4 and [launch for launch in launches if launch not in derived] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", [*(case for case in MATRIX if case.dim in (4, 1024)), *FEW], ids=str)
def test_lives(case: Case, derived: set[Launch]) -> None:
    with launches_on_a_gpu() as launches:
        live(case, TOY)
    assert len(launches) >= 10 and [launch for launch in launches if launch not in derived] == []


@pytest.mark.slow
@pytest.mark.parametrize("policy", DynamicEmbEvictStrategy, ids=lambda policy: policy.value)
def test_steady_states(policy: DynamicEmbEvictStrategy, derived: set[Launch]) -> None:
    with launches_on_a_gpu() as launches:
        for kind in OptimizerKind:
            test_steady_state.run([test_steady_state.case_of(kind, policy)], TOY)
    assert len(launches) >= 10 and [launch for launch in launches if launch not in derived] == []


@pytest.mark.slow
def test_what_is_not_derived_is_noticed(derived: set[Launch]) -> None:
    """A dim that no case has."""
    with launches_on_a_gpu() as launches:
        live(dataclasses.replace(FEW[0], dim=20), TOY)
    assert any(launch not in derived for launch in launches)
