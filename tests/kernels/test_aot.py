"""Every Triton kernel compiles for A100, H100 and B200 without a GPU, spills nothing and moves 128 bits at a time."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterable

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("in Triton's interpreter kernels are not compiled", allow_module_level=True)

from triton.runtime.jit import JITFunction

import dynamicemb.kernels
from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.fill import fill, initial_rows
from dynamicemb.kernels.find import find
from dynamicemb.kernels.gather import gather
from dynamicemb.kernels.hashing import mix64, owners
from dynamicemb.kernels.insert import insert
from dynamicemb.kernels.layout import MAX_CHUNKS, OptimizerKind, RowLayout
from dynamicemb.kernels.segment_sum import segment_sum
from dynamicemb.kernels.split import split
from dynamicemb.kernels.update import update
from dynamicemb.kernels.views import GroupView, InitializerView, UniqueKeys
from tests.kernels.aot import Launch, compiled, recorded_launches, resources

META = torch.device("meta")
BATCH, TABLES = 64, 3
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SGD, ADAGRAD, ROWWISE, ADAM = OptimizerKind
#: (bucket capacity, dim, row dtype, optimizer, gradient dtype) of whole steps: the common ones and the corners.
STEPS = [
    (128, 128, FP32, ADAM, FP32),
    (128, 64, FP16, ROWWISE, BF16),
    (8, 4, BF16, ADAGRAD, FP16),
    (256, 1024, FP32, SGD, FP32),
]
#: (dim, row dtype, optimizer, gradient dtype) of further updates: every optimizer, width class and dtype.
UPDATES = [
    (4, FP32, SGD, FP32),
    (20, BF16, ADAM, BF16),
    (64, FP32, ADAGRAD, FP32),
    (128, FP32, ROWWISE, FP32),
    (128, BF16, SGD, FP32),
    (1024, FP16, ADAM, FP16),
]


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def group_view(capacity: int, layout: RowLayout) -> GroupView:
    return GroupView(meta(4, TABLES * MAX_CHUNKS), meta(TABLES, 3), capacity, 2, layout)


def update_once(view: GroupView, unique: UniqueKeys, gradient_dtype: torch.dtype) -> None:
    gradients = meta(BATCH, view.layout.dim, dtype=gradient_dtype)
    update(view, unique, meta(BATCH), gradients, meta(TABLES, 5, dtype=torch.float64), meta(TABLES))


def whole_step(capacity: int, dim: int, dtype: torch.dtype, kind: OptimizerKind, gradient_dtype: torch.dtype) -> None:
    """Every operation once; find in all three forms."""
    view = group_view(capacity, RowLayout(dim, dtype, kind))
    keys, tables = meta(BATCH), meta(BATCH, dtype=torch.int32)
    init = InitializerView(
        meta(TABLES), meta(TABLES, dtype=torch.int32), meta(TABLES, 4, dtype=torch.float64), meta(TABLES, dtype=FP32)
    )
    unique = dedup(keys, tables, TABLES, 2)
    segment_sum(meta(BATCH, dim, dtype=gradient_dtype), unique)
    segment_sum(keys, unique)
    slots = find(view, unique)
    find(view, unique, keys)
    find(view, unique, keys, accumulate=True)
    insertion = insert(view, unique, slots, keys)
    fill(view, unique, slots, insertion.status, init)
    gather(view, slots, unique.inverse)
    update_once(view, unique, gradient_dtype)
    initial_rows(keys, tables, init, dim, dtype)
    split(view, 1, 5)


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    with recorded_launches() as recorded:
        mix64(meta(BATCH))
        owners(meta(BATCH), 2)
        for tables in (1, 300, 20_000):  # narrow sort keys of one, two and four bytes
            unique = dedup(meta(BATCH), meta(BATCH, dtype=torch.int32), tables, 2)
        for step in STEPS:
            whole_step(*step)
        for dim, dtype, kind, gradient_dtype in UPDATES:
            update_once(group_view(128, RowLayout(dim, dtype, kind)), unique, gradient_dtype)
    return recorded


def functions_called_in(function: JITFunction) -> set[str]:
    tree = ast.parse(inspect.getsource(function.fn))
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def all_kernels() -> Iterable[JITFunction]:
    """Every ``@triton.jit`` function of the package that no other one calls."""
    functions: dict[str, JITFunction] = {}
    for module in pkgutil.walk_packages(dynamicemb.kernels.__path__, "dynamicemb.kernels."):
        if module.name.rsplit(".", 1)[-1].startswith("triton"):
            members = vars(importlib.import_module(module.name)).values()
            functions.update(
                {f"{item.__module__}.{item.__name__}": item for item in members if isinstance(item, JITFunction)}
            )
    called = set().union(*(functions_called_in(function) for function in functions.values()))
    return [function for function in functions.values() if function.__name__ not in called]


def test_every_kernel_is_launched_above(launches: list[Launch]) -> None:
    """A new kernel needs a call in :func:`whole_step`, so that the tests below see it."""
    recorded = {launch.kernel.__name__ for launch in launches}
    kernels = {kernel.__name__ for kernel in all_kernels()}
    assert len(kernels) > 10
    assert kernels == recorded


@pytest.mark.parametrize("compute_capability", [80, 90, 100])
def test_kernels_compile_without_spilling(launches: list[Launch], compute_capability: int) -> None:
    spilling = []
    for launch in launches:
        used = resources(compiled(launch, compute_capability).asm["cubin"])
        if used.stack_bytes or used.local_bytes:
            spilling.append(f"{launch}: {used}")
    assert not spilling, "\n".join(spilling)


def ptx_of(launches: list[Launch], name: str, **constants: object) -> str:
    found = [
        launch for launch in launches
        if launch.kernel.__name__ == name and constants.items() <= dict(launch.constants).items()
    ]  # fmt: skip
    assert found, f"no launch of {name} with {constants}"
    return compiled(found[0], 90).asm["ptx"]


# Adam stores the row and two states; the 16-bit row of 20 columns in its second line takes 8 bytes for each thread.
@pytest.mark.parametrize(
    ("kernel", "constants", "loads", "stores"),
    [
        ("_gather_kernel", {"DIM": 128}, 1, 1),
        ("_gather_kernel", {"DIM": 64, "DTYPE": 1}, 1, 2),
        ("_update_kernel", {"DIM": 128, "OPTIMIZER": int(ADAM)}, 4, 3),
        ("_update_kernel", {"DIM": 20, "OPTIMIZER": int(ADAM)}, 2, 2),
        ("_sum_rows_kernel", {"DIM": 128}, 20, 1),
        ("_split_kernel", {"CAPACITY": 128}, 1, 1),
        ("_find_kernel", {"CAPACITY": 128}, 1, 0),
    ],
)
def test_lines_and_rows_move_128_bits_at_a_time(
    launches: list[Launch], kernel: str, constants: dict[str, object], loads: int, stores: int
) -> None:
    ptx = ptx_of(launches, kernel, **constants)
    assert ptx.count("ld.global.v4.b32") >= loads
    assert ptx.count("st.global.v4.b32") >= stores


@pytest.mark.parametrize("kernel", ["_fill_kernel", "_initial_rows_kernel", "_update_kernel"])
def test_arithmetic_is_not_fused(launches: list[Launch], kernel: str) -> None:
    """A fused multiply-add rounds once where the CPU engine rounds twice."""
    ptx = ptx_of(launches, kernel)
    assert "fma.rn" not in ptx
    assert ".ftz" not in ptx and ".approx" not in ptx and "div.full" not in ptx
