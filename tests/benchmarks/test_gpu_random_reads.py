"""The kernel of the random-read ceiling, in Triton's interpreter in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from gpu.ceilings import WIDTHS_BYTES
from gpu.random_reads import PROGRAM_WORDS, places_read, random_reads

from tests.benchmarks.conftest import BENCHMARKS
from tests.processes import python_path

SCRIPT = """
import torch
from gpu.random_reads import PROGRAM_WORDS, launched_reads, places_read
words = torch.randint(-2**62, 2**62, (1 << 14,))
for width in (1, 4, 8, 16):
    rows = words.view(-1, width).index_select(0, places_read(2048, words.numel() // width, 3))
    sums = rows.view(2048 * width // PROGRAM_WORDS, -1).sum(1)
    assert torch.equal(launched_reads(words, width, 2048, 3), sums), width
    assert not torch.equal(launched_reads(words, width, 2048, 4), sums), width
print("read")
"""


def test_the_kernel_reads_where_it_should() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": python_path(BENCHMARKS)}
    process = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert process.stdout == "read\n", process.stderr


def test_places_are_spread_over_the_array() -> None:
    places = places_read(4096, 1000, salt=1)
    assert int(places.min()) >= 0 and int(places.max()) < 1000
    assert places.bincount(minlength=1000).max() < 20  # of 4 on average
    assert places.unique().numel() > 950


def test_the_host_reads_as_much() -> None:
    words = torch.ones(1 << 14, dtype=torch.int64)
    for width in (width_bytes // 8 for width_bytes in WIDTHS_BYTES):
        sums = random_reads(words, width, 2048, salt=1)
        assert sums.tolist() == [PROGRAM_WORDS] * (2048 * width // PROGRAM_WORDS)
