"""How many warps of each kernel a multiprocessor must have registers for, and so how many registers a thread may take.

All architectures have as many registers: with up to 32 for each thread there is room for 64 warps, with 40 for 48, with
48 for 40, with 56 for 36, with 64 for 32, with 80 for 24, with 96 for 20, with 128 for 16, with 168 for 12.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.kernels.aot import warps_that_fit

__all__ = ["CEILINGS", "Ceiling"]


@dataclass(frozen=True)
class Ceiling:
    """A kernel's hungriest configuration leaves room for ``warps`` on each architecture."""

    warps: int
    reason: str

    @property
    def registers(self) -> int:
        """The most that a thread may take."""
        return max(number for number in range(8, 256, 8) if warps_that_fit(number) >= self.warps)


CEILINGS = {
    "_mix_kernel": Ceiling(64, "one pass over memory: as many loads under way as there can be"),
    "_owner_kernel": Ceiling(64, "as for _mix_kernel"),
    "_repeat_kernel": Ceiling(64, "writes one number over and over"),
    "_count_runs_kernel": Ceiling(40, "a search by one warp, four keys for each thread"),
    "_with_occurrences_kernel": Ceiling(64, "one pass over memory"),
    "_prefix_kernel": Ceiling(48, "one pass over memory, with a division"),
    "_compare_kernel": Ceiling(28, "two positions, keys and tables for each of four places"),
    "_settle_kernel": Ceiling(16, "works only where prefixes of different keys are equal"),
    "_number_kernel": Ceiling(20, "a scan holds all 16 values of a thread until their sum is known"),
    "_find_kernel": Ceiling(36, "programs are one warp, and no more than 32 of them fit"),
    "_insert_kernel": Ceiling(
        12, "a warp holds 1,024 slots of buckets, 64 registers of them scores; 16 except on sm_80"
    ),
    "_fill_kernel": Ceiling(32, "programs are one warp, and no more than 32 of them fit"),
    "_fill_kernel, quantile": Ceiling(12, "divisions in float64 are subroutines with registers of their own"),
    "_tally_kernel": Ceiling(40, "eight keys for each thread, and four sums"),
    "_note_kernel": Ceiling(32, "four keys for each thread, and the places in the ring of those that gave way"),
    "_note_touches_kernel": Ceiling(64, "copies one number to where slots are"),
    "_gather_kernel": Ceiling(40, "64 bytes of rows under way in each thread, and their addresses"),
    "_gather_rows_kernel": Ceiling(64, "as for _gather_kernel, with one address for each row"),
    "_block_sums_kernel": Ceiling(20, "as it asks for: 16 rows under way in each thread"),
    "_begin_update_kernel": Ceiling(20, "as for _block_sums_kernel, which it does besides counting"),
    "_update_kernel": Ceiling(24, "as it asks for where a warp has several rows; 32 where a row fills one"),
    "_fill_missing_kernel": Ceiling(32, "as for _fill_kernel"),
    "_fill_missing_kernel, quantile": Ceiling(12, "as for _fill_kernel"),
    "_split_kernel": Ceiling(48, "copies"),
    "_sum_integers_kernel": Ceiling(36, "eight values of each of 64 keys under way in a program, and their places"),
    "_sum_rows_kernel": Ceiling(32, "8 rows under way in each thread of a program of one warp; 32 of these fit"),
}
