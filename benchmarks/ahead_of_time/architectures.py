"""The GPUs that kernels are compiled for, and how many warps of a kernel one of their multiprocessors holds.

Limits: CUDA C++ Programming Guide, technical specifications for each compute capability. Rules of allocation: what
``cuda_occupancy.h`` of the CUDA toolkit computes.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture"]

_KIB = 1024
_THREADS_PER_WARP = 32
_SUBPARTITIONS = 4
#: Registers are given to a warp in units of this many.
_REGISTER_UNIT = 256
_SHARED_UNIT_BYTES = 128
#: Shared memory that the system takes from every block.
_SHARED_RESERVED_BYTES = 1 * _KIB


@dataclass(frozen=True)
class Architecture:
    """One multiprocessor.

    Attributes:
        compute_capability: 80 for 8.0.
        devices: that have it.
        shared_bytes: of shared memory.
        max_warps, max_blocks: that it keeps resident.
        registers: of 32 bits.
    """

    compute_capability: int
    devices: str
    shared_bytes: int
    max_warps: int = 64
    max_blocks: int = 32
    registers: int = 65_536

    @property
    def name(self) -> str:
        return f"sm_{self.compute_capability}"

    def resident_warps(self, registers: int, shared_bytes: int, warps: int) -> int:
        """Warps that one multiprocessor keeps resident.

        Args:
            registers: of a thread.
            shared_bytes: of a block.
            warps: of a block.
        """
        of_a_warp = _round_up(max(registers, 1) * _THREADS_PER_WARP, _REGISTER_UNIT)
        by_registers = self.registers // _SUBPARTITIONS // of_a_warp * _SUBPARTITIONS // warps
        by_shared = self.shared_bytes // _round_up(shared_bytes + _SHARED_RESERVED_BYTES, _SHARED_UNIT_BYTES)
        return warps * min(by_registers, by_shared, self.max_warps // warps, self.max_blocks)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


ARCHITECTURES = {
    architecture.compute_capability: architecture
    for architecture in (
        Architecture(80, "A100", 164 * _KIB),
        Architecture(90, "H100, H200", 228 * _KIB),
        Architecture(100, "B200", 228 * _KIB),
    )
}
