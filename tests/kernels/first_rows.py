"""First values of rows by themselves: what evaluation reads for keys of which no table has any."""

from __future__ import annotations

import torch

from dynamicemb.kernels.fill import fill_missing
from dynamicemb.kernels.views import InitializerView

__all__ = ["initial_rows"]


def initial_rows(
    keys: torch.Tensor, tables: torch.Tensor, init: InitializerView, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """float32 [N, dim]."""
    rows = torch.full((keys.numel(), dim), torch.nan, device=keys.device)
    fill_missing(rows, keys, tables, torch.full_like(keys, -1), init, dtype)
    return rows
