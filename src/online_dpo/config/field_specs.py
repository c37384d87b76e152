"""The fields of a dataclass with what is written about them, read from the text of the file that defines it.

So a field is documented once, in the string beneath it, and neither the command line nor the parsers that others bring
(``transformers.HfArgumentParser``, TRL's) need it a second time. Nothing heavy may be imported here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")
ANYTHING = "bool | int | str"
"""A type that the parsers of others cannot read; they take a text, or the field without a value as a switch."""
HEADING = re.compile(r"\s*# --- (.+?) -+$")


@dataclass(frozen=True)
class FieldSpec:
    """One field of a run file.

    >>> FieldSpec("beta", "list[float]", "[0.1]", "Strength of ...", group="Online DPO", choices=(), required=False)

    ``annotation`` and ``default`` are source text; ``default`` is ``None`` where it is no plain value. A ``Literal`` of
    texts is ``str`` in the annotation, and its texts are the ``choices``. ``section`` is the heading comment,
    ``# --- sampling ---``, under which the field stands.
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

    Documentation is the string beneath a field, or ``metadata["help"]`` as transformers writes it. Choices are those of
    a ``Literal`` in its type, which may have a name in the same file (``LossType = Literal["sigmoid", "ipo"]``), or
    ``metadata["choices"]``.
    """
    text = path.read_text(encoding="utf-8")
    module = ast.parse(text)
    body = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == class_name).body
    named, headings = _named_literals(module), _headings(text)
    specs = {}
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            section = next((heading for line, heading in reversed(headings) if line < node.lineno), "")
            specs[node.target.id] = _spec(node.target.id, node, _string_beneath(below), named, group, section)
    return specs


def _spec(
    name: str, node: ast.AnnAssign, doc: str, named: Mapping[str, ast.expr], group: str, section: str
) -> FieldSpec:
    """One field; ``named`` has the types with a name in its file."""
    options = _field_options(node.value)
    metadata = options.get("metadata")
    help_text, listed = _metadata(metadata) if isinstance(metadata, ast.Dict) else ("", ())
    annotation, choices = _without_literals(node.annotation, named)
    return FieldSpec(
        name=name,
        annotation=annotation,
        default=_default_text(options),
        doc=doc or help_text,
        group=group,
        choices=choices or listed,
        required=node.value is None,
        section=section,
    )


def documented(cls: type[T]) -> type[T]:
    """Decorate a dataclass: put the documentation and the choices of its own fields into their metadata.

    ``HfArgumentParser`` makes a parser from types, defaults and metadata. It does not understand three things: a list
    with items of a ``Literal`` type, the default of a field that may be a list but is not one by default, and a switch
    that may be unset and is given without a value. Therefore the types that it reads have ``str`` for each ``Literal``.
    """
    specs = _SPECS[cls] = read_class(Path(inspect.getfile(cls)), cls.__name__, group="")
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if field.name in specs:  # inherited fields have been documented where they stand
            field.metadata = MappingProxyType({**_parser_options(specs[field.name], field), **field.metadata})
            annotation = specs[field.name].annotation  # choices are in the metadata
            cls.__annotations__[field.name] = "str" if annotation == ANYTHING else annotation
    return cls


_SPECS: dict[type, dict[str, FieldSpec]] = {}


def specs_of(cls: type) -> dict[str, FieldSpec]:
    """The fields of a class and of the classes above it, by name, as far as these are `documented`."""
    return {name: spec for base in reversed(cls.__mro__) for name, spec in _SPECS.get(base, {}).items()}


def _parser_options(spec: FieldSpec, field: dataclasses.Field[Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"help": " ".join(spec.doc.split()).replace("%", "%%")}
    if spec.choices:
        options["choices"] = list(spec.choices)
    if "list" in spec.annotation and field.default is not dataclasses.MISSING:
        options["default"] = field.default
    if spec.annotation in ("bool | None", ANYTHING):
        options |= {"nargs": "?", "const": True}
    return options


def _headings(text: str) -> list[tuple[int, str]]:
    """The heading comments of a file and their lines."""
    matches = ((number, HEADING.match(line)) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, match[1]) for number, match in matches if match]


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


def _named_literals(module: ast.Module) -> dict[str, ast.expr]:
    """Types with a name, such as ``LossType = Literal["sigmoid", "ipo"]``."""
    return {
        node.targets[0].id: node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _texts_of(node.value)
    }


def _without_literals(annotation: ast.expr, named: Mapping[str, ast.expr]) -> tuple[str, tuple[str, ...]]:
    """A type with ``str`` for each ``Literal`` of texts, and these texts."""
    replace = _LiteralsToStr(named)
    return ast.unparse(replace.visit(annotation)), tuple(replace.texts)


class _LiteralsToStr(ast.NodeTransformer):
    """Puts ``str`` in place of each ``Literal`` of texts, or of its name, and keeps the texts, each once."""

    def __init__(self, named: Mapping[str, ast.expr]) -> None:
        self.named = named
        self.texts: dict[str, None] = {}

    def visit(self, node: ast.AST) -> ast.AST:
        """Returns the node, or ``str`` in its place."""
        texts = _texts_of(self.named.get(node.id, node) if isinstance(node, ast.Name) else node)
        self.texts |= dict.fromkeys(texts)
        return ast.Name("str") if texts else self.generic_visit(node)


def _texts_of(node: ast.AST) -> tuple[str, ...]:
    """``("a", "b")`` of ``Literal["a", "b"]``; nothing of another node, or where not all of them are texts."""
    if not (isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal"):
        return ()
    items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    texts = [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    return tuple(texts) if len(texts) == len(items) else ()


def _string_beneath(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return inspect.cleandoc(node.value.value)
    return ""
