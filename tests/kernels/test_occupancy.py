"""Programs that an SM holds at once: what NVIDIA's occupancy calculator says."""

from __future__ import annotations

import pytest

from dynamicemb.kernels.occupancy import resident_programs

WARPS = (1, 2, 4, 8)
#: Registers of a thread -> programs of 1, 2, 4 and 8 warps. An SM holds 64 warps in 32 programs, and each quarter of it
#: has 16,384 registers. Of 136 registers, for example, a warp takes 4352: three warps to a quarter, 12 to an SM.
RESIDENT = {
    32: (32, 32, 16, 8),
    56: (32, 18, 9, 4),
    60: (32, 16, 8, 4),
    64: (32, 16, 8, 4),
    84: (20, 10, 5, 2),
    96: (20, 10, 5, 2),
    104: (16, 8, 4, 2),
    112: (16, 8, 4, 2),
    128: (16, 8, 4, 2),
    136: (12, 6, 3, 1),
    168: (12, 6, 3, 1),
}


@pytest.mark.parametrize("registers", RESIDENT)
def test_registers(registers: int) -> None:
    assert tuple(resident_programs(warps, registers) for warps in WARPS) == RESIDENT[registers]


def test_few_registers_leave_the_limits_of_warps_and_programs() -> None:
    assert [resident_programs(warps, 1) for warps in (1, 2, 3, 4, 32)] == [32, 32, 21, 16, 2]


def test_programs_that_do_not_fit() -> None:
    assert resident_programs(16, 168) == 0
    assert resident_programs(4, 32, 164 * 1024) == 0  # the system takes 1 KiB of shared memory
    assert resident_programs(4, 32, 163 * 1024) == 1


def test_shared_memory() -> None:
    assert [resident_programs(4, 32, kib * 1024) for kib in (9, 10, 20, 40)] == [16, 14, 7, 4]
    assert [resident_programs(4, 32, kib * 1024, 228 * 1024) for kib in (9, 10, 20, 40)] == [16, 16, 10, 5]
