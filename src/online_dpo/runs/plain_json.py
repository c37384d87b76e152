"""Values of strict JSON: what a column or a note has of it, and numbers as the record of a run writes them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class _Array(Protocol):
    """An array or a scalar of NumPy or torch, which this module does not import."""

    ndim: int

    def item(self) -> Any: ...


DIGITS = 6
"""Significant digits of numbers that are only looked at."""

LONGEST_INT = 10_000
"""Bits of an integer that is written; Python refuses to print one much longer."""
DEEPEST = 32
"""Lists and mappings inside of each other that are written."""


def rounded(number: float | None) -> float | None:
    """A number with so many digits as are looked at; ``None`` where it is not finite.

    >>> rounded(0.123456789)
    0.123457
    """
    return None if number is None or not math.isfinite(number) else float(f"{float(number):.{DIGITS}g}")


def exact(number: float | None) -> float | None:
    """A number as it is; ``None`` where it is not finite, or larger than any float."""
    try:
        return None if number is None or not math.isfinite(number) else float(number)
    except OverflowError:  # an int or a fraction of any length
        return None


def number(value: Any) -> float | None:
    """A value that was read from a record as a finite number; ``None`` for anything else, such as a whole number that
    is larger than any float.
    """
    return exact(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def plain(value: Any) -> Any:
    """A value in the types that strict JSON has; a number that is not finite becomes ``None``.

    Raises:
        TypeError: JSON has nothing for the value, or for a part of it: bytes, an image, an object.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral) and int(value).bit_length() <= LONGEST_INT:
        return int(value)
    if isinstance(value, numbers.Real):
        return exact(value)  # pyright: ignore[reportArgumentType]: any kind of real number
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, _Array) and value.ndim == 0:
        return plain(value.item())
    raise TypeError(f"JSON has nothing for a {type(value).__name__}")


def plain_or_named(value: Any, depth: int = DEEPEST) -> Any:
    """As `plain`, with ``{"left_out": <its type>}`` in place of what JSON has nothing for, or is too deep inside."""
    if isinstance(value, (list, tuple)) and depth:
        return [plain_or_named(item, depth - 1) for item in value]
    if isinstance(value, Mapping) and depth:
        return {str(key): plain_or_named(item, depth - 1) for key, item in value.items()}
    try:
        return plain(value)
    except (TypeError, RecursionError):  # a list may hold itself
        return {"left_out": type(value).__name__}


def _key(key: Any) -> str:
    if not isinstance(key, (str, int)):
        raise TypeError(f"JSON has no key of type {type(key).__name__}")
    return str(key)
