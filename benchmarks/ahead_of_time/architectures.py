"""The GPUs that kernels are compiled for, and how many warps of a kernel one of their multiprocessors holds."""

from __future__ import annotations

from dataclasses import dataclass

from dynamicemb.kernels.occupancy import resident_programs

__all__ = ["ARCHITECTURES", "Architecture"]

_KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """One multiprocessor; what all of them have in common is in :mod:`dynamicemb.kernels.occupancy`.

    Attributes:
        compute_capability: 80 for 8.0.
        devices: that have it.
        shared_bytes: of shared memory.
    """

    compute_capability: int
    devices: str
    shared_bytes: int

    @property
    def name(self) -> str:
        return f"sm_{self.compute_capability}"

    def resident_warps(self, registers: int, shared_bytes: int, warps: int) -> int:
        """Warps that one multiprocessor keeps resident.

        Args:
            registers: of a thread.
            shared_bytes: of a program.
            warps: of a program.
        """
        return warps * resident_programs(warps, registers, shared_bytes, self.shared_bytes)


ARCHITECTURES = {
    architecture.compute_capability: architecture
    for architecture in (
        Architecture(80, "A100", 164 * _KIB),
        Architecture(90, "H100, H200", 228 * _KIB),
        Architecture(100, "B200", 228 * _KIB),
    )
}
