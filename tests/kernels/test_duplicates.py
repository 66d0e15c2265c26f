"""No function of the engine exists twice under two names; and a copy would be noticed."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("in Triton's interpreter kernels are not compiled", allow_module_level=True)

from tests.kernels import toy_kernels
from tests.kernels.aot import functions, ptx_of, recorded_launches, some_launches
from tests.kernels.duplicates import canonical_ptx, canonical_source, duplicates

TOYS = ("scale_kernel", "stretch_kernel", "shift_kernel")


def test_no_source_twice() -> None:
    assert len(functions()) > 20
    assert not duplicates({name: canonical_source(function) for name, function in functions().items()})


def test_no_machine_code_twice() -> None:
    """Also finds copies whose statements are in another order."""
    codes: dict[str, set[str]] = {}
    for launch in some_launches():
        codes.setdefault(launch.kernel, set()).add(canonical_ptx(ptx_of(launch)))
    assert len(codes) > 10
    assert not duplicates(codes)


def test_a_renamed_copy_is_found_in_its_source() -> None:
    sources = {name: canonical_source(getattr(toy_kernels, name)) for name in TOYS}
    assert duplicates(sources) == [("scale_kernel", "stretch_kernel")]


def test_a_renamed_copy_is_found_in_its_machine_code() -> None:
    with recorded_launches() as launches:
        toy_kernels.launch_all()
    codes = {launch.kernel: canonical_ptx(ptx_of(launch)) for launch in launches if launch.kernel in TOYS}
    assert len(codes) == 3
    assert duplicates(codes) == [("scale_kernel", "stretch_kernel")]
