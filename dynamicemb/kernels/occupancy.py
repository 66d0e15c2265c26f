"""How many programs of a kernel one multiprocessor (SM) of a GPU holds at once.

The limits are those of every NVIDIA data-centre GPU since Ampere (CUDA C++ Programming Guide, technical specifications
for each compute capability); only shared memory differs among them. The rules of allocation are those of
``cuda_occupancy.h`` in the CUDA toolkit.
"""

from __future__ import annotations

__all__ = ["resident_programs"]

_THREADS_PER_WARP = 32
_WARPS_PER_SM, _PROGRAMS_PER_SM = 64, 32
# Each quarter of an SM has registers of its own, and a warp gets all of its own from one of them, in units of 256. So
# three warps of 136 registers fit in a quarter, although 3.76 would fill it.
_QUARTERS, _REGISTERS_PER_QUARTER, _REGISTER_UNIT = 4, 16_384, 256
# Shared memory goes to a program in units, and the system takes some for itself from each.
_SHARED_UNIT_BYTES, _SHARED_RESERVED_BYTES = 128, 1024
# Of an A100; later ones have 228 KiB.
_SHARED_BYTES_PER_SM = 164 * 1024


def resident_programs(
    warps: int, registers: int, shared_bytes: int = 0, shared_bytes_per_sm: int = _SHARED_BYTES_PER_SM
) -> int:
    """Programs that one SM holds at once; 0 if not even one fits.

    Args:
        warps: of a program.
        registers: of a thread.
        shared_bytes: of a program.
        shared_bytes_per_sm: what the SM has of them; by default what every architecture has.
    """
    registers_per_warp = _round_up(max(registers, 1) * _THREADS_PER_WARP, _REGISTER_UNIT)
    by_registers = _QUARTERS * (_REGISTERS_PER_QUARTER // registers_per_warp) // warps
    by_shared = shared_bytes_per_sm // _round_up(shared_bytes + _SHARED_RESERVED_BYTES, _SHARED_UNIT_BYTES)
    return min(by_registers, by_shared, _WARPS_PER_SM // warps, _PROGRAMS_PER_SM)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
