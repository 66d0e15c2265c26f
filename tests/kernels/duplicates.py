"""Functions that do the same under different names: found in their source, and in what they compile to."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, Union

import triton.language as tl
from triton.runtime.jit import JITFunction

__all__ = ["canonical_ptx", "canonical_source", "duplicates"]


class _Canonical(ast.NodeTransformer):
    """Gives what a function itself names (parameters, variables) names by first appearance, and puts in the place of
    every other name what it stands for."""

    def __init__(self, function: JITFunction, parameters: Iterable[str]) -> None:
        self._scope = {**function.fn.__globals__, **inspect.getclosurevars(function.fn).nonlocals}
        self._names: dict[str, str] = {}
        for name in parameters:
            self._own(name)

    def _own(self, name: str) -> str:
        return self._names.setdefault(name, f"v{len(self._names)}")

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Store) or node.id in self._names:
            return ast.Name(self._own(node.id), node.ctx)
        meaning = self._scope.get(node.id, node.id)
        if isinstance(meaning, JITFunction):
            return ast.Constant(canonical_source(meaning))
        if isinstance(meaning, tl.constexpr):
            return ast.Constant(repr(meaning.value))
        return ast.Name(meaning.__name__ if isinstance(meaning, ModuleType) else node.id, node.ctx)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Keywords of our own functions become numbers of parameters."""
        callee = self._scope.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if isinstance(callee, JITFunction):
            for keyword in node.keywords:
                if keyword.arg is not None:
                    keyword.arg = f"p{callee.arg_names.index(keyword.arg)}"
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant("")
        return self.generic_visit(node)


def canonical_source(function: JITFunction) -> str:
    """The function without its name, its documentation and the names of its variables."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    canonical = _Canonical(function, function.arg_names)
    body = [
        ast.dump(canonical.visit(statement))
        for statement in tree.body
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
    ]
    return "\n".join([str([parameter.is_constexpr for parameter in function.params]), *body])


def canonical_ptx(ptx: str) -> str:
    """The instructions, without the kernel's name, comments and lines of the source."""
    (name,) = re.findall(r"\.visible \.entry (\w+)", ptx)
    code = ptx.replace(name, "kernel").partition(".section")[0]
    lines = (re.sub(r"//.*", "", line).strip() for line in code.splitlines())
    return "\n".join(line for line in lines if line and not re.match(r"\.(loc|file)\b|\$L__(tmp|func)\w+:", line))


def duplicates(texts: Mapping[str, Union[str, set[str]]]) -> list[tuple[Any, ...]]:
    """Groups of names that have a canonical text in common."""
    owners: dict[str, list[str]] = {}
    for name, some in texts.items():
        for text in {some} if isinstance(some, str) else some:
            owners.setdefault(text, []).append(name)
    return sorted({tuple(names) for names in owners.values() if len(names) > 1})
