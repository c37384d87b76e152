"""The fields of a dataclass with what is written about them, read from the text of the file that defines it.

So a field is documented once, in the string beneath it, and neither the command line nor the parsers that others bring
(``transformers.HfArgumentParser``, TRL's) need it a second time. Nothing heavy may be imported here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")
HEADING = re.compile(r"\s*# --- (.+?) -+$")


@dataclass(frozen=True)
class FieldSpec:
    """One field of a run file.

    >>> FieldSpec("beta", "list[float]", "[0.1]", "Strength of ...", group="Online DPO", choices=(), required=False)

    ``annotation`` and ``default`` are source text; ``default`` is ``None`` where it is no plain value. ``section`` is
    the heading comment, ``# --- sampling ---``, under which it stands.
    """

    name: str
    annotation: str
    default: str | None
    doc: str
    group: str
    choices: tuple[str, ...] = ()
    required: bool = False
    section: str = ""


def read_class(path: Path, class_name: str, group: str) -> dict[str, FieldSpec]:
    """The dataclass fields of a class, in order, by parsing the file that defines it.

    Documentation is the string beneath a field, or ``metadata["help"]`` as transformers writes it. Choices are
    ``metadata["choices"]``, or a module constant that the file pairs with the field's name, as in
    ``("loss_type", LOSS_TYPES)``.
    """
    text = path.read_text(encoding="utf-8")
    module = ast.parse(text)
    body = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == class_name).body
    paired, headings = _paired_choices(module), _headings(text)
    found = {}
    for node, below in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        name, options = node.target.id, _field_options(node.value)
        metadata = options.get("metadata")
        help_text, listed = _metadata(metadata) if isinstance(metadata, ast.Dict) else ("", ())
        found[name] = FieldSpec(
            name=name,
            annotation=ast.unparse(node.annotation),
            default=_default_text(options),
            doc=_string_beneath(below) or help_text,
            group=group,
            choices=listed or paired.get(name, ()),
            required=node.value is None,
            section=next((heading for line, heading in reversed(headings) if line < node.lineno), ""),
        )
    return found


def documented(cls: type[T]) -> type[T]:
    """Decorates a dataclass: what is written about its own fields enters their metadata, for ``HfArgumentParser``.

    A parser is made of type, default and metadata. Two kinds of default it does not see by itself: that of a field
    which may be a list but is none, and that a switch which may also be unset can stand without a value.
    """
    specs = read_class(Path(inspect.getfile(cls)), cls.__name__, group="")
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if field.name in specs:  # inherited fields have been documented where they stand
            field.metadata = MappingProxyType({**_parser_options(specs[field.name], field), **field.metadata})
    return cls


def _parser_options(spec: FieldSpec, field: dataclasses.Field[Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"help": " ".join(spec.doc.split()).replace("%", "%%")}
    if spec.choices:
        options["choices"] = list(spec.choices)
    if "list" in spec.annotation and field.default is not dataclasses.MISSING:
        options["default"] = field.default
    if spec.annotation == "bool | None":
        options |= {"nargs": "?", "const": True}
    return options


def _headings(text: str) -> list[tuple[int, str]]:
    """The heading comments of a file and their lines."""
    found = ((number, HEADING.match(line)) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, match[1]) for number, match in found if match]


def _field_options(value: ast.expr | None) -> dict[str, ast.expr]:
    """``field(default=1, metadata={...})`` as its keywords; a plain value is its default."""
    if value is None:
        return {}
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        return {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg}
    return {"default": value}


def _default_text(options: Mapping[str, ast.expr]) -> str | None:
    factory = options.get("default_factory")
    if factory is not None:
        return (
            ast.unparse(factory.body) if isinstance(factory, ast.Lambda) else {"list": "[]"}.get(ast.unparse(factory))
        )
    default = options.get("default")
    return None if default is None or isinstance(default, ast.Name) else ast.unparse(default)


def _metadata(node: ast.Dict) -> tuple[str, tuple[str, ...]]:
    """Help text and choices of a metadata literal; what is no literal (a function call) is left out."""
    entries = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(value, (ast.Constant, ast.List)):
            entries[key.value] = ast.literal_eval(value)
    return entries.get("help", ""), tuple(entries.get("choices", ()))


def _paired_choices(module: ast.Module) -> dict[str, tuple[str, ...]]:
    constants = dict(_string_tuples(module))
    pairs = (node.elts for node in ast.walk(module) if isinstance(node, ast.Tuple) and len(node.elts) == 2)
    return {
        name.value: constants[values.id]
        for name, values in pairs
        if isinstance(name, ast.Constant) and isinstance(name.value, str)
        if isinstance(values, ast.Name) and values.id in constants
    }


def _string_tuples(module: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Module constants such as ``LOSS_TYPES = ("sigmoid", "ipo")``."""
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Tuple):
            items = [item.value for item in node.value.elts if isinstance(item, ast.Constant)]
            if items and all(isinstance(item, str) for item in items):
                yield node.targets[0].id, tuple(map(str, items))


def _string_beneath(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return inspect.cleandoc(node.value.value)
    return ""
