"""References to the user's code, ``file.py:function`` and ``package.module:function``: checks and imports them."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.errors import named_error

OF_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
"""Reward functions that TRL's scripts accept by name."""


@dataclass(frozen=True)
class Reference:
    """A file or module, and a name that it defines.

    >>> Reference("rewards.py:brevity", name="brevity", file=Path("recipes/rewards.py"), module=None)

    Exactly one of ``file`` and ``module`` is set.
    """

    text: str
    name: str
    file: Path | None
    module: str | None


@dataclass(frozen=True)
class ModuleReference:
    """A file or module that is to be imported. Exactly one of ``file`` and ``module`` is set."""

    text: str
    file: Path | None
    module: str | None


def parse_module(text: str, folders: Sequence[Path]) -> ModuleReference:
    """Check, without importing it, that a file or module is there. A relative file is looked for in ``folders``.

    Raises:
        ValueError: no such file or module, or it is no valid Python. The message reads on from the text.
    """
    if text.endswith(".py"):
        file = _find_file(text, folders)
        _parsed(file, text)
        return ModuleReference(text, file.resolve(), None)
    if not all(part.isidentifier() for part in text.split(".")):
        raise ValueError("wanted: `file.py` or `package.module`")
    if (source := _locate_module(text)) is not None:
        _parsed(source, text)
    return ModuleReference(text, None, text)


def load_module(reference: ModuleReference) -> Any:
    """Import a file or module. Modules are looked for in the working folder as well.

    Raises:
        ValueError: importing the user's code failed; the message says in which line, and the cause is chained.
    """
    try:
        return _import_file(reference.file) if reference.file else _import_module(reference.module)
    except (Exception, SystemExit) as problem:  # anything may happen in the user's own code
        frames = traceback.extract_tb(problem.__traceback__)
        own = [frame.lineno for frame in frames if reference.file and frame.filename == str(reference.file)]
        line = f" in line {own[-1]}" if own else ""
        raise ValueError(f"importing `{reference.text}` failed{line}: {named_error(problem)}") from problem


def parse_reference(text: str, folders: Sequence[Path]) -> Reference:
    """Split a reference and check, without importing, that its file or module defines the name.

    A relative path is searched in ``folders``, in order.

    Raises:
        ValueError: the form is wrong, or there is no such file, module or name. The message continues a sentence that
            begins with the reference.
    """
    place, colon, name = text.rpartition(":")
    if not (colon and place and name.isidentifier()):
        raise ValueError(f"wanted: `file.py:function` or `package.module:function`{_meant(text)}")
    if place.endswith(".py"):
        file = _find_file(place, folders)
        _check_defines(file, name, names=place)
        return Reference(text, name, file=file.resolve(), module=None)
    if not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"`{place}` is neither a .py file nor a module name")
    source = _locate_module(place)
    if source is not None:
        _check_defines(source, name, names=place)
    return Reference(text, name, file=None, module=place)


def _meant(text: str) -> str:
    """A hint on what a reference without a colon may mean."""
    if text in OF_TRL:
        return f", such as `trl.rewards:{text}`"
    module, dot, name = text.rpartition(".")
    if text.endswith(".py"):
        return f", such as `{text}:reward`"
    if dot and "/" not in text and all(part.isidentifier() for part in text.split(".")):
        return f", such as `{module}:{name}`"
    return "; a reward model goes into `reward_model_path`" if "/" in text or Path(text).is_dir() else ""


def load_reference(reference: Reference) -> Any:
    """Import the object that a reference names. Modules are also searched in the working folder.

    Raises:
        ValueError: importing the user's code failed; the cause is chained.
    """
    try:
        module = _import_file(reference.file) if reference.file else _import_module(reference.module)
        return getattr(module, reference.name)
    except (Exception, SystemExit) as problem:  # the user's code may raise anything
        raise ValueError(f"importing `{reference.text}` failed: {named_error(problem)}") from problem


def _find_file(text: str, folders: Sequence[Path]) -> Path:
    candidates = [folder / Path(os.path.expanduser(text)) for folder in folders]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise ValueError(f"there is no file {' or '.join(dict.fromkeys(map(str, candidates)))}")
    return file


def _import_file(file: Path) -> Any:
    """Import a file once, under a name that is the same in every process, so that two references share one module."""
    name = f"online_dpo_user_{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, str(file.parent))  # the file may import other files of its folder
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _import_module(name: str | None) -> Any:
    assert name is not None
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _locate_module(name: str) -> Path | None:
    """Find the source file of a module without importing it or its packages; ``None`` if it has none."""
    folders: Sequence[str] | None = [str(Path.cwd()), *sys.path]
    spec = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        qualified = ".".join(parts[:end])
        spec = importlib.machinery.PathFinder.find_spec(qualified, folders) if folders else None
        if spec is None and end == 1:
            spec = importlib.util.find_spec(qualified)  # built in, or found by an editable install's own finder
        if spec is None:
            raise ValueError(f"there is no module `{qualified}`")
        folders = spec.submodule_search_locations
    assert spec is not None
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _parsed(file: Path, names: str) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"), filename=names)
    except (SyntaxError, UnicodeDecodeError, ValueError) as problem:
        raise ValueError(f"`{names}` is no valid Python: {problem}") from None


def _check_defines(file: Path, name: str, names: str) -> None:
    defined = list(_defined_names(_parsed(file, names).body))
    if name not in defined and "*" not in defined and "__getattr__" not in defined:
        public = ", ".join(other for other in defined if not other.startswith("_"))
        raise ValueError(f"`{names}` defines no `{name}`" + (f"; it defines: {public}" if public else ""))


def _defined_names(body: Sequence[ast.stmt]) -> Iterator[str]:
    """The names that statements of a module define, also inside ``if`` and ``try``; ``*`` for a star import."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
            case ast.If() | ast.With() | ast.For() | ast.While():
                yield from _defined_names([*node.body, *getattr(node, "orelse", [])])
            case ast.Try():
                handlers = [statement for handler in node.handlers for statement in handler.body]
                yield from _defined_names([*node.body, *handlers, *node.orelse, *node.finalbody])
