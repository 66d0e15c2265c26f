"""The GPU's own calls, where there is one, and what the host says instead."""

from __future__ import annotations

import subprocess

import pytest
import torch
from gpu import device
from gpu.device import RUNS_BEFORE_CAPTURE, CudaDevice, HostDevice
from gpu.rounds import timed
from host import Accelerator


def _accelerator(name: str) -> Accelerator:
    return Accelerator(name, "1", "1", 1.0, 1.0, 1, 1.0)


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H200", "nvidia-h200"), ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("", "gpu")],
)
def test_gpus_are_named_after_themselves(name: str, slug: str) -> None:
    assert _accelerator(name).slug == slug


def test_the_driver_is_asked_in_two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: object, **options: object) -> object:
        raise FileNotFoundError("nvidia-smi")

    class Answer:
        stdout = "580.159.03\n580.159.03\n"

    monkeypatch.setattr(subprocess, "run", absent)
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\nGCC version: 12.2"
    monkeypatch.setattr(device.Path, "read_text", lambda path: text)
    assert device._driver_version() == "580.82.07"
    monkeypatch.setattr(device.Path, "read_text", absent)
    assert device._driver_version() == "unknown"
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: Answer())
    assert device._driver_version() == "580.159.03"


def test_the_host_takes_time() -> None:
    host = HostDevice()
    first = host.mark()
    torch.ones(1000).sum()
    assert host.seconds_between(first, host.mark()) > 0
    assert host.free_bytes() > 0 and host.facts().memory_gib > 0


@pytest.mark.gpu
def test_the_gpu_measures_captures_and_profiles() -> None:
    gpu = CudaDevice()
    counter, matrix = torch.zeros(1, device="cuda"), torch.rand(2048, 2048, device="cuda")
    (seconds,) = timed(gpu, lambda index: matrix @ matrix, samples=1)
    assert 1e-6 < seconds < 1
    replay = gpu.capture(lambda: counter.add_(1))
    replay()
    gpu.synchronize()
    assert counter.item() == RUNS_BEFORE_CAPTURE + 1
    runs = gpu.profile(lambda index: matrix.add_(index), 5)
    assert len(runs) == 5 and all(1e-7 < run.seconds < 1 for run in runs)
    assert runs == sorted(runs, key=lambda run: run.start)
    facts = gpu.facts()
    assert facts.driver != "unknown" and facts.multiprocessors > 0 and 0 < facts.free_gib <= facts.memory_gib
