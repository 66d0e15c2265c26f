"""Topic: what the device's memory can do. Every expectation of the other topics is made of these figures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from figures import CheckError, Figure, Spread

from gpu import traffic
from gpu.device import GIB
from gpu.random_reads import PROGRAM_WORDS, places_read, random_reads
from gpu.rounds import timed
from gpu.topic import Case, Context, Measured, Topic

__all__ = ["DRY", "FULL", "Size", "topic"]

WORD_BYTES = 8
#: Of a random read.
WIDTHS_BYTES = (8, 32, 64, 128)
#: Reads whose places and sums are computed again in Python.
CHECKED_READS = 2048
CHECKED_WORDS = 1 << 20
SORTED_BATCHES = 8


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        copied_bytes: by one copy.
        arrays_bytes: of what is read at random, ascending.
        reads: of one sample.
        sorted_keys: numbers of keys.
        samples: of each figure.
    """

    copied_bytes: int
    arrays_bytes: tuple[int, ...]
    reads: int
    sorted_keys: tuple[int, ...]
    samples: int


#: Below and above the 64 GB from which address translation may no longer keep up.
FULL = Size(4 * GIB, (4 * GIB, 40 * GIB, 96 * GIB), 1 << 26, (1 << 16, 1 << 18, 1 << 20, 1 << 22), samples=12)
DRY = Size(1 << 20, (1 << 18, 1 << 20), 1 << 12, (1 << 10, 1 << 12), samples=3)


def _copy(context: Context, size: Size) -> Measured:
    source = _noise(size.copied_bytes // WORD_BYTES, context.torch_device)
    target = torch.empty_like(source)
    seconds = timed(context.device, lambda index: target.copy_(source), size.samples, repetitions=2)
    if not torch.equal(source, target):
        raise CheckError("the copy differs from its source")
    num_bytes = 2 * size.copied_bytes
    rates = Spread.of([num_bytes / second for second in seconds])
    context.ceilings.copy_bytes_per_s = rates.median
    spread = Spread(rates.median / 1e12, rates.p10 / 1e12, rates.p90 / 1e12, rates.samples)
    figure = Figure("copy, read + written", "TB/s", spread, moved_bytes=num_bytes, copy_share=1.0)
    return Measured([figure], {"copy, s": seconds})


def _noise(words: int, device: torch.device) -> torch.Tensor:
    """int64 [words]; memory can be faster on zeros."""
    array = torch.empty(words, dtype=torch.int64, device=device)
    for part in array.split(1 << 27):
        part.random_()
    return array


def check_random_reads(device: torch.device) -> None:
    """Compares the kernel's sums with sums over places that Python computed; nothing on the host, where no kernel runs.

    Raises:
        CheckError: they differ.
    """
    if device.type == "cpu":
        return
    words = _noise(CHECKED_WORDS, device)
    for width in (width_bytes // WORD_BYTES for width_bytes in WIDTHS_BYTES):
        places = places_read(CHECKED_READS, CHECKED_WORDS // width, salt=3).to(device)
        rows = words.view(-1, width).index_select(0, places)
        expected = rows.view(CHECKED_READS * width // PROGRAM_WORDS, -1).sum(1)
        if not torch.equal(random_reads(words, width, CHECKED_READS, salt=3), expected):
            raise CheckError(f"reads of {width * WORD_BYTES} bytes went elsewhere than they should")


def _random(context: Context, size: Size, array_bytes: int) -> Measured:
    check_random_reads(context.torch_device)
    words = _noise(array_bytes // WORD_BYTES, context.torch_device)
    measured, rates = Measured(), {}
    for width_bytes in WIDTHS_BYTES:
        width = width_bytes // WORD_BYTES

        def read(index: int, width: int = width) -> object:
            return random_reads(words, width, size.reads, salt=index)

        seconds = timed(context.device, read, size.samples)
        spread = Spread.of([1e-9 * size.reads / second for second in seconds])
        rates[width_bytes] = 1e9 * spread.median
        num_bytes = size.reads * width_bytes
        name = f"random reads of {width_bytes} bytes, {_gib(array_bytes)} array"
        share = context.ceilings.copy_share(num_bytes, size.reads / rates[width_bytes])
        measured.figures.append(Figure(name, "G reads/s", spread, moved_bytes=num_bytes, copy_share=share))
        measured.series[f"{name}, {size.reads:,} of them, s"] = seconds
    context.ceilings.random_reads_per_s[array_bytes] = rates
    return measured


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g} GiB"


def _sort(context: Context, size: Size, dtype: torch.dtype) -> Measured:
    measured, name = Measured(), str(dtype).removeprefix("torch.")
    by_count = context.ceilings.sort_seconds.setdefault(dtype.itemsize, {})
    for count in size.sorted_keys:
        words = _noise(SORTED_BATCHES * count, context.torch_device)
        batches = words.view(dtype)[: SORTED_BATCHES * count].view(SORTED_BATCHES, count)

        def run(index: int, batches: torch.Tensor = batches) -> object:
            return torch.sort(batches[index % SORTED_BATCHES], stable=True)

        seconds = timed(context.device, run, size.samples, repetitions=4)
        by_count[count] = Spread.of(seconds).median
        label = f"torch's stable sort of {count:,} {name}"
        work = traffic.sort(count, dtype.itemsize)
        figure = context.time_figure(label, seconds, unit="µs")
        share = context.ceilings.copy_share(work.num_bytes, by_count[count])
        measured.figures.append(dataclasses.replace(figure, moved_bytes=work.num_bytes, copy_share=share))
        measured.series[f"{label}, s"] = seconds
    return measured


def topic(context: Context) -> Topic:
    """The copy comes first: the others are compared with it."""
    size = DRY if context.dry else FULL
    cases = [
        Case("copy", lambda deadline: _copy(context, size), 2, 2 * size.copied_bytes),
        Case("sort of int32", lambda deadline: _sort(context, size, torch.int32), 2),
        Case("sort of int64", lambda deadline: _sort(context, size, torch.int64), 2),
    ]
    for array_bytes in size.arrays_bytes:

        def run(deadline: float, array_bytes: int = array_bytes) -> Measured:
            return _random(context, size, array_bytes)

        cases.append(Case(f"random reads, {_gib(array_bytes)}", run, 4, array_bytes))
    return Topic(
        name="ceilings",
        title="What the memory of the device can do",
        setup=(
            f"A copy of {_gib(size.copied_bytes)}, counted twice. Random reads: {size.reads:,} a launch, eight words "
            "under way in each thread, places computed from the number of the read, each launch at other places of an "
            f"array full of noise. Sorts of random integers with their positions. Medians over {size.samples} samples."
        ),
        check="The copy equals its source; the sums of a small launch equal those over places computed in Python.",
        cases=cases,
    )
