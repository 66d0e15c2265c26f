"""Rows of a tensor on the Triton engine: the same bits. For rows of tables see :mod:`test_triton_table`."""

from __future__ import annotations

import pytest
import torch

from dynamicemb.kernels.gather import gather_rows
from tests.kernels.group_state import both_engines
from tests.kernels.triton_host import DEVICE, MARKS, engine

pytestmark = MARKS
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 4, 12, 20, 64, 128, 1024])
def test_rows_are_those_of_index_select(dim: int, dtype: torch.dtype) -> None:
    """Copied as they are, NaN included; tiles are full and not, rows end inside them and do not."""
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(50, dim, generator=generator).to(dtype)
    rows[3] = torch.nan
    for count in (1, 128, 333):
        inverse = torch.randint(0, 50, (count,), generator=generator)
        expected, actual = both_engines(gather_rows, rows, inverse)
        assert actual.dtype == dtype
        assert torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(expected.view(torch.uint8), rows.index_select(0, inverse).view(torch.uint8))


def test_parts_of_other_tensors() -> None:
    """A row that begins at no multiple of 16 bytes, and rows that are not neighbours."""
    with engine("triton"):
        for rows in (
            torch.randn(9 * 12 + 1, device=DEVICE)[1:].view(9, 12),
            torch.randn(9, 30, device=DEVICE)[:, 3:15],
        ):
            inverse = torch.tensor([8, 0, 0, 3, 8], device=DEVICE)
            assert torch.equal(gather_rows(rows, inverse), rows[inverse])
            assert torch.equal(gather_rows(rows, inverse[1:]), rows[inverse[1:]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows(rows: int, dtype: torch.dtype) -> None:
    inverse = torch.empty(0, dtype=torch.int64)
    expected, actual = both_engines(gather_rows, torch.empty(rows, 8, dtype=dtype), inverse)
    assert actual.shape == expected.shape == (0, 8) and actual.dtype == expected.dtype == dtype
