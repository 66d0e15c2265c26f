"""Barriers lie between the accesses of several warps to one address; and a missing one is noticed.

PTX is read by ``benchmarks/ahead_of_time/barriers.py``, for all launches in ``make aot``.
"""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("in Triton's interpreter kernels are not compiled", allow_module_level=True)

from tests.kernels import toy_races
from tests.kernels.aot import (
    Launch,
    PtxError,
    RandomInterpreter,
    compilations,
    compiled,
    kernels,
    parse,
    ptx_of,
    races,
    recorded_launches,
    some_launches,
)

#: Kernels of several warps in which memory orders what they do, and not only registers.
NEED_BARRIERS = ("_begin_update_kernel", "_settle_kernel", "_split_kernel", "_update_kernel")


def warps(launch: Launch) -> int:
    return dict(launch.options)["num_warps"]


@pytest.mark.parametrize("kernel", sorted(kernels()))
def test_warps_do_not_race(kernel: str) -> None:
    for launch in some_launches():
        if launch.kernel == kernel and warps(launch) > 1:
            assert races(ptx_of(launch)) == [], launch


@pytest.mark.slow
def test_warps_do_not_race_on_other_architectures() -> None:
    for launch, architecture in compilations():
        if architecture != 90:
            assert races(str(compiled(launch, architecture).asm["ptx"])) == [], launch


def without_barriers(ptx: str) -> str:
    return re.sub(r"bar\.sync[^;]*;", "", ptx)


@pytest.mark.parametrize("kernel", NEED_BARRIERS)
def test_kernels_without_their_barriers_race(kernel: str) -> None:
    launches = [launch for launch in some_launches() if launch.kernel == kernel and warps(launch) > 1]
    assert launches
    for launch in launches:
        assert races(without_barriers(ptx_of(launch))), launch


def test_the_barrier_of_a_split_is_the_one_that_it_needs() -> None:
    for launch in some_launches():
        if launch.kernel == "_split_kernel":
            ptx = ptx_of(launch)
            assert ptx.count("bar.sync") == 1
            found = races(without_barriers(ptx))
            assert found and all(re.search(r"ld\.global\.b8.*st\.global\.b8", race) for race in found)


def toys(barrier: bool) -> dict[str, str]:
    """PTX by kernel."""
    with recorded_launches() as launches:
        toy_races.launch_all(barrier)
    return {launch.kernel: ptx_of(launch) for launch in launches}


def test_each_toy_without_its_barrier_races() -> None:
    found = {kernel: races(ptx) for kernel, ptx in toys(barrier=False).items()}
    needs_none = {"own_kernel", "atomic_kernel"}
    assert {kernel for kernel, sentences in found.items() if not sentences} == needs_none
    assert len(found) == len(needs_none) + 7
    # The same access, the same line, whatever Triton has made of it.
    (accumulated,) = found["accumulate_kernel"]
    assert re.search(r"ld\.global\.b32.* and .*st\.global\.b32.* of another warp", accumulated)
    assert accumulated.count("(kernels/toy_races.py:") == 2


def test_toys_with_their_barriers_do_not_race() -> None:
    assert {kernel: sentences for kernel, ptx in toys(barrier=True).items() if (sentences := races(ptx))} == {}


# What the check reads and computes, on small programs.

TEXT = """
.visible .entry kernel(.param .u64 kernel_param_0)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<19>;
	.reg .b64 	%rd<19>;
	mov.u32 	%r1, %tid.x;
{body}
	ret;
}}
"""


def program(body: str, threads: int = 64) -> str:
    return TEXT.format(threads=threads, body=body)


def computed(body: str) -> list[int]:
    """What 64 threads have in %rd9 at the end of ``body``."""
    text = program(f"{body}\nld.global.b8 %rs8, [%rd9];")
    (block, *_) = parse(text).blocks
    run = RandomInterpreter(parse(text))
    *_, access, _ = [run.run(instruction) for instruction in block.instructions]
    assert access is not None and access.may_run.all()
    return access.addresses.view(np.int64).tolist()


THREADS = range(64)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("sub.s32 %r2, %r1, 9; mul.wide.s32 %rd9, %r2, -3;", lambda t: (t - 9) * -3),
        ("sub.s32 %r2, %r1, 9; mul.wide.u32 %rd9, %r2, 3;", lambda t: (t - 9) % 2**32 * 3),
        ("mov.b64 %rd1, -5; mad.wide.s32 %rd9, %r1, 8, %rd1;", lambda t: 8 * t - 5),
        ("mad.lo.s32 %r2, %r1, %r1, 1; cvt.u64.u32 %rd9, %r2;", lambda t: t * t + 1),
        ("sub.s32 %r2, %r1, 9; cvt.s64.s32 %rd9, %r2;", lambda t: t - 9),
        ("sub.s32 %r2, %r1, 9; cvt.u64.u32 %rd9, %r2;", lambda t: (t - 9) % 2**32),
        ("sub.s32 %r2, %r1, 9; shr.s32 %r3, %r2, 2; cvt.s64.s32 %rd9, %r3;", lambda t: (t - 9) >> 2),
        ("sub.s32 %r2, %r1, 9; shr.u32 %r3, %r2, 2; cvt.u64.u32 %rd9, %r3;", lambda t: (t - 9) % 2**32 >> 2),
        ("shl.b32 %r2, %r1, 30; cvt.u64.u32 %rd9, %r2;", lambda t: (t << 30) % 2**32),
        ("mov.b64 %rd1, 1; shl.b64 %rd9, %rd1, %r1;", lambda t: (1 << t) - (1 << 64 if t == 63 else 0)),
        ("bfe.u32 %r2, %r1, 2, 3; cvt.u64.u32 %rd9, %r2;", lambda t: t >> 2 & 7),
        ("bfe.s32 %r2, %r1, 2, 3; cvt.s64.s32 %rd9, %r2;", lambda t: (t >> 2 & 7) - (8 if t & 16 else 0)),
        ("sub.s32 %r2, %r1, 9; min.s32 %r3, %r2, 3; cvt.s64.s32 %rd9, %r3;", lambda t: min(t - 9, 3)),
        ("sub.s32 %r2, %r1, 9; min.u32 %r3, %r2, 3; cvt.u64.u32 %rd9, %r3;", lambda t: min((t - 9) % 2**32, 3)),
        ("setp.lt.s32 %p1, %r1, 9; selp.b64 %rd9, 7, 0x10, %p1;", lambda t: 7 if t < 9 else 16),
        ("mov.b64 %rd9, 5; setp.ge.u32 %p1, %r1, 9; @!%p1 mov.b64 %rd9, 6;", lambda t: 6 if t < 9 else 5),
        ("mov.b64 %rd9, {%r1, 1};", lambda t: t + 2**32),
        ("mov.b64 %rd1, {2, %r1}; mov.b64 {_, %r2}, %rd1; cvt.u64.u32 %rd9, %r2;", lambda t: t),
        ("shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1; cvt.u64.u32 %rd9, %r2;", lambda t: t ^ 5),
        ("shfl.sync.up.b32 %r2|%p1, %r1, 3, 0, -1; cvt.u64.u32 %rd9, %r2;", lambda t: t - 3 if t % 32 > 2 else t),
        ("shfl.sync.down.b32 %r2, %r1, 3, 31, -1; cvt.u64.u32 %rd9, %r2;", lambda t: t + 3 if t % 32 < 29 else t),
        ("shfl.sync.idx.b32 %r2, %r1, 7, 31, -1; cvt.u64.u32 %rd9, %r2;", lambda t: t // 32 * 32 + 7),
        ("redux.sync.add.s32 %r2, %r1, -1; cvt.u64.u32 %rd9, %r2;", lambda t: 496 + t // 32 * 1024),
    ],
)  # fmt: skip
def test_integers_are_computed(body: str, expected: object) -> None:
    assert computed(body) == [expected(thread) for thread in THREADS]  # type: ignore[operator]


def test_threads_exchange_through_shared_memory() -> None:
    body = """
        shl.b32 %r2, %r1, 3;
        mul.lo.s32 %r3, %r1, %r1;
        st.shared.v2.b32 [%r2], {%r1, %r3};
        xor.b32 %r4, %r2, 0x1f8;
        ld.shared.b32 %r5, [ %r4 + 4 ];
        cvt.u64.u32 %rd9, %r5;
    """
    assert computed(body) == [(63 - thread) ** 2 for thread in THREADS]


def test_threads_exchange_matrices_through_shared_memory() -> None:
    """Four of 8 rows of 16 bytes: a register of thread ``4 * r + c`` is word ``c`` of row ``r`` of a matrix."""
    write = (
        "and.b32 %r2, %r1, 32; shl.b32 %r3, %r2, 4; bfe.u32 %r4, %r1, 0, 5; shl.b32 %r5, %r4, 4; add.s32 %r6, %r3, %r5;"
    )
    matrices = "{%r11, %r12, %r13, %r14}"
    stored = computed(f"""
        {write}
        mul.lo.s32 %r11, %r1, 10; add.s32 %r12, %r11, 1; add.s32 %r13, %r11, 2; add.s32 %r14, %r11, 3;
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r6], {matrices};
        shl.b32 %r7, %r4, 2; add.s32 %r8, %r3, %r7; ld.shared.b32 %r9, [%r8+128]; cvt.u64.u32 %rd9, %r9;
    """)
    assert stored == [thread * 10 + 1 for thread in THREADS]
    loaded = computed(f"""
        {write}
        st.shared.v4.b32 [%r6], {{%r1, 1, 2, 3}};
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {matrices}, [%r6];
        cvt.u64.u32 %rd9, %r13;
    """)
    assert loaded == [
        thread // 32 * 32 + 16 + thread % 32 // 4 if thread % 4 == 0 else thread % 4 for thread in THREADS
    ]


def test_unknown_values_are_the_same_where_their_operands_are() -> None:
    """Words of memory, and sums of two floats in either order."""
    pairs = "xor.b32 %r2, %r1, 1; cvt.u64.u32 %rd1, %r1; cvt.u64.u32 %rd2, %r2;"
    sums = computed(f"{pairs} add.f64 %rd9, %rd1, %rd2;")
    assert sums[::2] == sums[1::2] and len({*sums}) == 32
    words = computed("shr.u32 %r2, %r1, 1; shl.b32 %r3, %r2, 3; cvt.u64.u32 %rd1, %r3; ld.global.b64 %rd9, [%rd1];")
    assert words[::2] == words[1::2] and len({*words}) == 32


STORE, LOAD = "st.global.b32 [%rd1], %r1;", "ld.global.b32 %r2, [%rd1];"
ONE_ADDRESS = "ld.param.b64 %rd1, [kernel_param_0]; setp.eq.s32 %p1, %r1, 0; setp.lt.s32 %p2, %r1, 32;"


@pytest.mark.parametrize(
    ("body", "racing"),
    [
        (f"{LOAD} @%p1 {STORE}", True),
        (f"{LOAD} bar.sync 0; @%p1 {STORE}", False),
        (f"{LOAD} barrier.sync 0; @%p1 {STORE}", False),
        (f"@%p1 {STORE} {LOAD}", True),
        (f"@%p2 {LOAD} @%p1 {STORE}", False),  # by one warp
        (f"@!%p2 {LOAD} @%p1 {STORE}", True),
        (f"{LOAD} @%p1 st.global.b32 [%rd1+4], %r1;", False),
        (f"{LOAD} @%p1 st.global.b8 [%rd1+3], %rs1;", True),
        (f"{LOAD} @%p1 st.global.b32 [%rd1], %r2;", False),  # what is there already
        (f"@%p1 {STORE} @!%p2 st.global.b32 [%rd1], 7;", True),
        ("@%p1 atom.global.add.u32 %r3, [%rd1], 1; @!%p2 red.global.add.u32 [%rd1], 1;", False),
        (f"@%p1 red.global.add.u32 [%rd1], 1; {LOAD}", True),
        (f"{LOAD} setp.gt.s32 %p3, %r2, 9; @%p3 bra $L1; bar.sync 0; $L1: @%p1 {STORE}", True),
        (f"{LOAD} setp.gt.s32 %p3, %r2, 9; @%p3 bra $L1; bar.sync 0; bra.uni $L2; $L1: bar.sync 0; $L2: @%p1 {STORE}",
         False),
        (f"$L1: {LOAD} bar.sync 0; @%p1 {STORE} setp.gt.s32 %p3, %r2, 9; @%p3 bra $L1;", True),
        (f"$L1: {LOAD} bar.sync 0; @%p1 {STORE} bar.sync 0; setp.gt.s32 %p3, %r2, 9; @%p3 bra $L1;", False),
        (f"@%p1 {STORE} ret; {LOAD}", False),
    ],
)  # fmt: skip
def test_races(body: str, racing: bool) -> None:
    """Each statement on a line of its own, as a compiler writes them."""
    text = program(re.sub(r"(?<=[;:]) ", "\n", f"{ONE_ADDRESS} {body}"))
    assert bool(races(text)) is racing
    assert races(text.replace(".reqntid 64", ".reqntid 32")) == []


@pytest.mark.parametrize(
    "statement",
    [
        "cp.async.cg.shared.global [%r1], [%rd1], 16;", "bar.sync 1, 64;", "@%p1 bar.sync 0;", "ld.b32 %r2, [%rd1];",
        "st.local.b32 [%rd1], %r2;", "call.uni (%r2), function, (%r1);", "mbarrier.arrive.shared.b64 %rd1, [%r1];",
        f"mov.u32 %r1, %clock; {LOAD}",
    ],
)  # fmt: skip
def test_what_is_not_understood_is_not_passed(statement: str) -> None:
    with pytest.raises(PtxError):
        races(program(statement))
