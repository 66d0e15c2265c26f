"""What others have published for the same work, and what our results call it."""

from __future__ import annotations

from typing import Optional

from figures import Published

from dynamicemb.kernels.layout import OptimizerKind

__all__ = ["NAMES", "STEP_SOURCE", "TABLE_SOURCE", "hierarchical_kv", "step_milliseconds", "step_ratio"]

#: Of the optimizers in results.
NAMES = {
    OptimizerKind.SGD: "SGD",
    OptimizerKind.ADAGRAD: "Adagrad",
    OptimizerKind.ROWWISE_ADAGRAD: "row-wise Adagrad",
    OptimizerKind.ADAM: "Adam",
}
NEIGHBOUR = "NVIDIA dynamicemb, H100 80 GB"
STATIC = "fbgemm TBE, H100 80 GB"
STEP_SOURCE = (
    "Published: NVIDIA's dynamicemb beside fbgemm's static TBE on one H100 80 GB, 10 tables, dim 128, float32, "
    "1,048,570 ids a step by a power law with exponent 1.05, 350,000 of them distinct, 1.68 million rows a table."
)
TABLE_SOURCE = (
    "Published: HierarchicalKV, batches of a million keys; A100 at dim 64, H100 NVL at dim 32. Its pointer-only "
    "operations stand beside ours without rows, its others beside ours with rows."
)

_PHASES = ("forward", "backward", "evaluation")
#: Milliseconds of the phases: the neighbour's, then those of the static tables.
_STEP = {
    OptimizerKind.ADAM: ((1.34, 0.85, 0.64), (0.35, 1.00, 0.46)),
    OptimizerKind.SGD: ((1.33, 0.59, 0.64), (0.34, 0.61, 0.41)),
}
#: Billions of keys a second by (operation, dim, load).
_TABLE = {
    ("find, rows", 64, 0.5): (1.98, "A100"),
    ("find, rows", 64, 1.0): (2.02, "A100"),
    ("find", 64, 0.5): (3.95, "A100"),
    ("find", 64, 1.0): (1.97, "A100"),
    ("find_or_insert, rows", 64, 0.5): (1.11, "A100"),
    ("find_or_insert, rows", 64, 1.0): (0.61, "A100"),
    ("insert_and_evict, rows", 64, 0.5): (0.81, "A100"),
    ("insert_and_evict, rows", 64, 1.0): (0.48, "A100"),
    ("find, rows", 32, 0.5): (3.7, "H100 NVL"),
    ("find", 32, 0.5): (7.05, "H100 NVL"),
    ("find_or_insert", 32, 0.5): (4.85, "H100 NVL"),
}


def step_milliseconds(kind: OptimizerKind, static: bool, phase: str) -> Optional[Published]:
    """Of ``forward``, ``backward`` or ``evaluation``; None for an optimizer without numbers."""
    if kind not in _STEP:
        return None
    return Published(_STEP[kind][static][_PHASES.index(phase)], STATIC if static else NEIGHBOUR)


def step_ratio(kind: OptimizerKind) -> Optional[Published]:
    """The neighbour's forward and backward over the static table's."""
    if kind not in _STEP:
        return None
    neighbour, static = (sum(phases[:2]) for phases in _STEP[kind])
    return Published(round(neighbour / static, 2), NEIGHBOUR)


def hierarchical_kv(operation: str, dim: int, load: float) -> Optional[Published]:
    """G keys/s of ``find``, ``find_or_insert`` or ``insert_and_evict``, with ``, rows`` where rows are moved too."""
    numbers = _TABLE.get((operation, dim, load))
    return None if numbers is None else Published(numbers[0], f"HierarchicalKV, {numbers[1]}")
