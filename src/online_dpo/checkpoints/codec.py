"""Dataclasses to JSON and back, checked against their types: reading a file never runs code from it.

A dataclass becomes an object of its fields. Types may be dataclasses, numbers, texts, lists, tuples of any length,
mappings with text keys, counters, literals, unions of these, and ``Any`` for what JSON has itself. Floats are exact.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from online_dpo.errors import CheckpointError

T = TypeVar("T")
KIND = "kind"
"""The entry that says which dataclass of a union an object is."""
PLAIN = frozenset({int, float, bool, str, NoneType})
OF_SCALAR = {int: frozenset({int}), float: frozenset({int, float}), str: frozenset({str})}
"""What a list of each of these types may hold; a step has a million numbers, which are looked at together."""


def write_json(path: Path, value: Any) -> None:
    """Writes a dataclass, or what JSON has itself, to a file. NaN and infinite numbers are written as Python does."""
    path.write_text(json.dumps(to_json(value)) + "\n", encoding="utf-8")


def read_json(path: Path, as_type: type[T]) -> T:
    """Reads what `write_json` wrote.

    Raises:
        CheckpointError: there is no such file, it is no JSON, or its content is not of this type.
    """
    try:
        return from_json(as_type, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, so this checkpoint is not whole. Give another one.") from None
    except (ValueError, RecursionError, OSError) as problem:
        raise CheckpointError(f"{path} is damaged ({problem}). Give another checkpoint.") from None


def to_json(value: Any) -> Any:
    """Returns a value in the types that `json` writes; a dataclass becomes a dict that has its name as ``kind``.

    >>> to_json(Preference(chosen=2, rejected=0, probability=0.9))
    {'kind': 'Preference', 'chosen': 2, 'rejected': 0, 'probability': 0.9}

    Raises:
        TypeError: JSON has nothing for a value.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, float):
        return float(value)
    if is_dataclass(value):
        return {KIND: type(value).__name__} | {
            field.name: to_json(getattr(value, field.name)) for field in fields(value)
        }
    if isinstance(value, (list, tuple)):
        return list(value) if _are_plain(value, PLAIN) else [to_json(item) for item in value]
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"keys must be text; one is {wrong[0]!r}")
        return {key: to_json(item) for key, item in value.items()}
    return operator.index(value)


def from_json(as_type: Any, value: Any) -> Any:
    """Returns a value of the given type, made of what `to_json` returned for it.

    Raises:
        ValueError: the value is not of this type.
    """
    origin, arguments = get_origin(as_type), get_args(as_type)
    if as_type is Any:
        return value
    if is_dataclass(as_type):
        return _dataclass(as_type, value)
    if origin in (Union, UnionType):
        return _one_of(arguments, value)
    if origin is Literal:
        return _checked(value, value in arguments and isinstance(value, str), " or ".join(map(repr, arguments)))
    if origin in (list, tuple):
        return origin(_items(arguments[0], _checked(value, isinstance(value, list), "a list")))
    if origin is Counter:
        return Counter(_mapping(value, int))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(value, arguments[1])
    return _scalar(as_type, value)


def _scalar(as_type: Any, value: Any) -> Any:
    if as_type is float:  # a whole number stays one, as it was written
        return _checked(value, isinstance(value, (int, float)) and not isinstance(value, bool), "a number")
    if as_type is int:
        return _checked(value, isinstance(value, int) and not isinstance(value, bool), "a whole number")
    assert as_type in (str, bool, NoneType), as_type
    return _checked(value, isinstance(value, as_type), {str: "text", bool: "true or false"}.get(as_type, "null"))


def _items(of: Any, items: list[Any]) -> list[Any]:
    if of in OF_SCALAR and _are_plain(items, OF_SCALAR[of]):
        return items
    return [from_json(of, item) for item in items]


def _are_plain(items: Collection[Any], types: frozenset[type]) -> bool:
    return types.issuperset(map(type, items))


def _mapping(value: Any, of: Any) -> dict[str, Any]:
    _checked(value, isinstance(value, dict), "a mapping")
    return {key: from_json(of, item) for key, item in value.items()}


def _dataclass(as_type: Any, value: Any) -> Any:
    _checked(
        value,
        isinstance(value, dict) and value.get(KIND, as_type.__name__) == as_type.__name__,
        f"a {as_type.__name__}",
    )
    types = _types(as_type)
    present = {name: from_json(kind, value[name]) for name, kind in types.items() if name in value}
    if missing := [field.name for field in fields(as_type) if field.name not in present and not _has_default(field)]:
        raise ValueError(f"a {as_type.__name__} lacks {', '.join(missing)}")
    return as_type(**present)


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _one_of(types: tuple[Any, ...], value: Any) -> Any:
    """A value of a union: of the dataclass that it names, or else of the first type that it fits."""
    if isinstance(value, dict):
        for kind in types:
            if is_dataclass(kind) and kind.__name__ == value.get(KIND):  # pyright: ignore[reportAttributeAccessIssue]
                return from_json(kind, value)
    problems = []
    for kind in types:
        try:
            return from_json(kind, value)
        except ValueError as problem:
            problems.append(str(problem))
    raise ValueError(problems[0])


@cache
def _types(of: type) -> dict[str, Any]:
    hints = get_type_hints(of)
    return {field.name: hints[field.name] for field in fields(of)}  # pyright: ignore[reportArgumentType]


def _checked(value: Any, holds: bool, wanted: str) -> Any:
    if not holds:
        shown = repr(value)
        raise ValueError(f"wanted {wanted}, found {shown if len(shown) <= 60 else shown[:60] + '...'}")
    return value
