"""Reads JSON that comes from outside, so that nothing in it is silently another value. Nothing heavy may be imported
here.

`json` alone keeps the last of two equal keys, reads ``1e400`` as infinity, drops digits of long decimals, and ends in a
``RecursionError`` (in some threads in a crash) where text is nested some thousand levels deep.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 100
"""Levels of lists and objects inside each other. Whatever walks values afterwards recurses as deeply."""
EXACT_DIGITS = 17
"""A float cannot hold a whole part of as many digits."""

_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_WHOLE_PART = re.compile(r"-?(\d+)\.\d+\Z")


def parse_json(text: str) -> Any:
    """Read a JSON text. ``NaN`` and ``Infinity`` are read as `json` does.

    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}

    Raises:
        ValueError: the text is no JSON (a `json.JSONDecodeError`), is nested too deeply, has a key twice in one object,
            or a number that would become another one.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_too_deep(text):
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    return json.loads(text, object_pairs_hook=_object, parse_float=_float, parse_int=_int)


def depth_of(value: Any, limit: int = MAX_DEPTH) -> int:
    """The number of levels of lists and dicts inside each other, counted up to ``limit`` + 1.

    >>> depth_of([1, {"a": []}])
    3
    """
    depth, level = 0, [value]
    while depth <= limit:
        containers = {id(item): item for item in level if isinstance(item, (dict, list))}
        if not containers:
            return depth
        depth += 1
        level = [item for container in containers.values() for item in _items(container)]
    return depth


def _items(container: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _is_too_deep(text: str) -> bool:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        letter = match.group()
        if letter in ("[", "{"):
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif letter in ("]", "}"):
            depth -= 1
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {double!r} stands twice in one object")
    return values


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:30]} is beyond the range of a float; write it as text")
    whole = _WHOLE_PART.match(text) if len(text) > EXACT_DIGITS else None
    if whole and len(whole[1]) >= EXACT_DIGITS:
        raise ValueError(f"the number {text[:50]} has more digits than a float holds; write it as text")
    return value


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python reads no more than 4300 digits
        raise ValueError(f"a number has {len(text)} digits; write it as text") from None
