"""What stays outside of ``torch.compile``: a model around dynamic tables may be compiled, they themselves cannot be.

A lookup depends on what is in the tables and changes them, runs kernels of Numba or Triton, and exchanges sizes that
the host must know; a graph can hold none of that. So dynamo leaves these functions, and all that they call, as they
are. It breaks the graph before them and goes on behind them, and the dense parts are compiled. ``fullgraph=True``,
which allows no such break, ends in torch's own error.
"""

from __future__ import annotations

import torch

__all__ = ["eager"]

#: Decorates a function that dynamo is to call, not to trace.
eager = torch.compiler.disable(reason="lookups in dynamic tables run kernels of their own and change the tables")
