"""Checks that the package stays easy to read: sizes of files and functions, docstrings, names kept inside modules.

python scripts/check_limits.py            says what is beyond a limit, and exits with 1
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "online_dpo"
ROOT_MODULES = 6
FILE_LINES, FILE_MEDIAN = 400, 140
FUNCTION_LINES, FUNCTION_P90 = 60, 20

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A file of the package, read and parsed."""

    path: Path
    lines: int
    tree: ast.Module

    @property
    def name(self) -> str:
        return self.path.relative_to(PACKAGE).as_posix()

    def functions(self) -> Iterator[Function]:
        """Yields every function and method, nested ones too."""
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


def read_package() -> list[Module]:
    """Returns all modules of the package."""
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        modules.append(Module(path, len(text.splitlines()), ast.parse(text)))
    return modules


def length(node: Function) -> int:
    """Returns the lines of a function, with its signature and docstring, without decorators."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def sizes(modules: list[Module]) -> Iterator[str]:
    """Yields what is too long."""
    roots = [module.name for module in modules if "/" not in module.name]
    if len(roots) > ROOT_MODULES:
        yield f"the root of the package has {len(roots)} modules, at most {ROOT_MODULES}: {', '.join(roots)}"
    for module in modules:
        if module.lines > FILE_LINES:
            yield f"{module.name}: {module.lines} lines, at most {FILE_LINES}"
        for node in module.functions():
            if length(node) > FUNCTION_LINES:
                yield f"{module.name}:{node.lineno}: `{node.name}` has {length(node)} lines, at most {FUNCTION_LINES}"
    median = statistics.median(module.lines for module in modules)
    if median > FILE_MEDIAN:
        yield f"the median file has {median:.0f} lines, at most {FILE_MEDIAN}"
    p90 = statistics.quantiles([length(node) for module in modules for node in module.functions()], n=10)[-1]
    if p90 > FUNCTION_P90:
        yield f"the 90th percentile of functions is {p90:.0f} lines, at most {FUNCTION_P90}"


def docstrings(modules: list[Module]) -> Iterator[str]:
    """Yields public definitions without a docstring, or with one whose first line does not say what they do."""
    for module in modules:
        if ast.get_docstring(module.tree) is None and module.path.name != "__init__.py":
            yield f"{module.name}: the module has no docstring"
        for node in module.tree.body:
            if isinstance(node, (ast.ClassDef, Function)) and not node.name.startswith("_"):
                yield from _docstring(module, node)
        for node in ast.walk(module.tree):
            first = (ast.get_docstring(node) or "-").strip() if isinstance(node, (ast.ClassDef, Function)) else "-"
            if first.startswith(("Raises:", "Args:", "Returns:")):
                yield f"{module.name}:{node.lineno}: the docstring of `{node.name}` does not begin with what it does"


def _docstring(module: Module, node: ast.ClassDef | Function) -> Iterator[str]:
    if ast.get_docstring(node) is None:
        yield f"{module.name}:{node.lineno}: `{node.name}` has no docstring"


def private_imports(modules: list[Module]) -> Iterator[str]:
    """Yields imports of another module's private names."""
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("online_dpo"):
                for alias in node.names:
                    if alias.name.startswith("_") and not alias.name.startswith("__"):
                        yield f"{module.name}:{node.lineno}: `{alias.name}` is private to `{node.module}`"


def main() -> int:
    """Prints what is beyond a limit; returns the exit code."""
    modules = read_package()
    problems = [*sizes(modules), *docstrings(modules), *private_imports(modules)]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
