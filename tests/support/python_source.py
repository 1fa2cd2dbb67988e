"""What a Python source imports and calls, by full dotted name: the ground under the tests of the house rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Use:
    """A dotted name in a source: `name` on `line`, in the function `function` ("" at module level)."""

    name: str
    line: int
    function: str
    is_import: bool


def python_files(*folders: str) -> list[Path]:
    """All Python sources under these folders of the repository, in a fixed order."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    """The path as seen from the repository root, with forward slashes."""
    return path.relative_to(ROOT).as_posix()


def module_name(relative_path: str) -> str:
    """`kernels/megavlm_kernels/a/b.py` -> `megavlm_kernels.a.b`; a package is named without `__init__`."""
    parts = relative_path.removesuffix(".py").split("/")
    if parts[0] == "kernels":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_name(relative_path: str) -> str:
    """The package that a relative import in this file starts from."""
    module = module_name(relative_path)
    return module if relative_path.endswith("__init__.py") else module.rpartition(".")[0]


def uses(source: str, relative_path: str) -> list[Use]:
    """Every import, and every attribute chain that starts at an imported name, as full dotted names."""
    collector = _Collector(package_name(relative_path))
    collector.visit(ast.parse(source, filename=relative_path))
    return collector.found


def functions(source: str, relative_path: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function and method, nested ones included."""
    for node in ast.walk(ast.parse(source, filename=relative_path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    """The full name of `a.b.c`, given what the local names stand for; None for anything that is no plain chain."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, names)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def imported_names(tree: ast.AST, package: str) -> dict[str, str]:
    """Local name -> full dotted name, for all imports of a source wherever they stand."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            origin = import_origin(node, package)
            names.update({alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names})
    return names


def import_origin(node: ast.ImportFrom, package: str) -> str:
    """The absolute module of a `from ... import`, relative dots resolved."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


class _Collector(ast.NodeVisitor):
    """Walks a source, remembering the enclosing function of every dotted name found."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.found: list[Use] = []
        self._functions: list[str] = []
        self._names: dict[str, str] = {}

    def visit_Module(self, node: ast.Module) -> None:
        self._names = imported_names(node, self.package)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._functions.append(node.name)
        self.generic_visit(node)
        self._functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno, is_import=True)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        origin = import_origin(node, self.package)
        for alias in node.names:
            self._add(origin if alias.name == "*" else f"{origin}.{alias.name}", node.lineno, is_import=True)

    def visit_Call(self, node: ast.Call) -> None:
        called = dotted(node.func, self._names)
        if called in ("importlib.import_module", "__import__") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                self._add(target.value, node.lineno, is_import=True)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        name = dotted(node, self._names)
        if name is not None and isinstance(root, ast.Name) and root.id in self._names:
            self._add(name, node.lineno, is_import=False)
        else:
            self.generic_visit(node)

    def _add(self, name: str, line: int, *, is_import: bool) -> None:
        self.found.append(Use(name, line, self._functions[-1] if self._functions else "", is_import))
