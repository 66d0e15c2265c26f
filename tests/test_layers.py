"""Imports go down only, torchrec stays where it belongs, and there are no circles: read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import dynamicemb

ROOT = Path(dynamicemb.__file__).parent
PACKAGE = "dynamicemb"
# Lower layers first. Files of one layer may import each other, as long as there is no circle.
LAYERS = (
    ("errors", "names", "version"),
    ("options", "installation"),
    ("kernels",),
    ("table",),
    ("planner", "shard", "checkpoint"),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MAY_IMPORT_TORCHREC = ("planner", "shard")
# What `import dynamicemb` shows: options and errors, and nothing that needs more than torch.
ROOT_MAY_IMPORT = ("errors", "options", "version")


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = (PACKAGE, *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, module: str, is_package: bool) -> list[str]:
    """Full dotted names of everything that a file imports, at the top or inside functions: ``a.b`` for
    ``import a.b`` and ``a.b.c`` for ``from a.b import c``."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{prefix}.{alias.name}" for alias in node.names]
    return names


def resolved(name: str, modules: Iterable[str]) -> str:
    """The module that an imported name comes from: the longest prefix that is a module of ours."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def graph_of(sources: dict[str, tuple[str, bool]]) -> dict[str, list[str]]:
    """module -> names it imports, those of ours as modules; ``sources`` holds (text, is a package) by module."""
    graph = {}
    for module, (source, is_package) in sources.items():
        names = imported_names(source, module, is_package)
        ours = [resolved(name, sources) for name in names if name.split(".")[0] == PACKAGE]
        graph[module] = sorted({*ours, *(name for name in names if name.split(".")[0] != PACKAGE)})
    return graph


def layer_violations(graph: dict[str, list[str]]) -> list[str]:
    """Every import that goes up, by a module without a layer, or of torchrec from the wrong place."""
    violations = []
    for module, imports in graph.items():
        layer = module.split(".")[1] if "." in module else ""
        if layer and layer not in LEVEL:
            violations.append(f"{module} belongs to no layer")
            continue
        for name in imports:
            if name.split(".")[0] == "torchrec" and layer not in MAY_IMPORT_TORCHREC:
                violations.append(f"{module} imports {name}")
            if name.split(".")[0] != PACKAGE:
                continue
            target = name.split(".")[1] if "." in name else ""
            if not layer:
                allowed = target in ROOT_MAY_IMPORT
            elif not target:
                allowed = layer == "cli"  # for the version
            else:
                allowed = LEVEL.get(target, len(LAYERS)) <= LEVEL[layer]
            if not allowed:
                violations.append(f"{module} imports {name}")
    return violations


def circle(graph: dict[str, list[str]]) -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for name in graph.get(module, []):
            ring = visit(name, [*path, module])
            if ring:
                return ring
        done.add(module)
        return []

    return next((ring for module in graph for ring in [visit(module, [])] if ring), [])


@pytest.fixture(scope="module")
def graph() -> dict[str, list[str]]:
    paths = sorted(ROOT.rglob("*.py"))
    assert len(paths) > 20
    return graph_of({module_name(path): (path.read_text(), path.name == "__init__.py") for path in paths})


def test_imports_go_down_only(graph: dict[str, list[str]]) -> None:
    assert layer_violations(graph) == []


def test_there_are_no_circles(graph: dict[str, list[str]]) -> None:
    assert circle(graph) == []


def test_engines_of_one_operation_do_not_import_the_other_engine(graph: dict[str, list[str]]) -> None:
    for module, imports in graph.items():
        engine = module.rpartition(".")[2]
        other = {"cpu": "triton", "triton": "cpu"}.get(engine)
        if module.startswith(f"{PACKAGE}.kernels.") and other:
            assert not [name for name in imports if name.startswith(PACKAGE) and name.endswith(f".{other}")], module


def test_importing_the_package_loads_neither_torchrec_nor_a_compiler() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import dynamicemb; "
        "print({m for m in ('torchrec', 'fbgemm_gpu', 'triton', 'numba') if m in sys.modules and m not in before})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "set()"


# The checks themselves, on sources that break each rule.

GOOD = {
    "dynamicemb": ("from dynamicemb.errors import E", True),
    "dynamicemb.errors": ("import math", False),
    "dynamicemb.options": ("from dynamicemb.errors import E", False),
    "dynamicemb.kernels": ("", True),
    "dynamicemb.kernels.find": ("from dynamicemb.kernels import layout", True),
    "dynamicemb.kernels.layout": ("import torch", False),
    "dynamicemb.table": ("from .kernels_of import x", True),
    "dynamicemb.table.kernels_of": ("from dynamicemb.kernels.find import find", False),
    "dynamicemb.shard": ("import torchrec.distributed\nfrom dynamicemb.planner import p", True),
    "dynamicemb.planner": ("from torchrec import x\nfrom dynamicemb import options", True),
    "dynamicemb.cli": ("import dynamicemb\nfrom dynamicemb.shard import s", True),
}


def test_the_rules_accept_good_sources() -> None:
    assert layer_violations(graph_of(GOOD)) == []
    assert circle(graph_of(GOOD)) == []


@pytest.mark.parametrize(
    ("module", "source", "violation"),
    [
        ("dynamicemb.errors", "import dynamicemb.options", "dynamicemb.errors imports dynamicemb.options"),
        (
            "dynamicemb.kernels.layout",
            "def f():\n from ..table import x",
            "dynamicemb.kernels.layout imports dynamicemb.table",
        ),
        ("dynamicemb.table", "from dynamicemb.shard import s", "dynamicemb.table imports dynamicemb.shard"),
        ("dynamicemb.table", "import torchrec", "dynamicemb.table imports torchrec"),
        ("dynamicemb.cli", "from torchrec.x import y", "dynamicemb.cli imports torchrec.x.y"),
        (
            "dynamicemb.kernels.find",
            "from dynamicemb import options, table",
            "dynamicemb.kernels.find imports dynamicemb.table",
        ),
        ("dynamicemb", "from dynamicemb import table", "dynamicemb imports dynamicemb.table"),
        ("dynamicemb.options", "import dynamicemb", "dynamicemb.options imports dynamicemb"),
        ("dynamicemb.utils", "", "dynamicemb.utils belongs to no layer"),
    ],
)
def test_the_rules_notice(module: str, source: str, violation: str) -> None:
    is_package = GOOD.get(module, ("", False))[1]
    assert layer_violations(graph_of({**GOOD, module: (source, is_package)})) == [violation]


def test_a_circle_is_noticed() -> None:
    bad = {**GOOD, "dynamicemb.kernels.layout": ("def f():\n    from dynamicemb.kernels.find import x", False)}
    assert set(circle(graph_of(bad))) == {"dynamicemb.kernels.find", "dynamicemb.kernels.layout"}
    package_and_part = {**GOOD, "dynamicemb.table.kernels_of": ("from dynamicemb.table import y", False)}
    assert set(circle(graph_of(package_and_part))) == {"dynamicemb.table", "dynamicemb.table.kernels_of"}
