"""Settings and environments as flat tables: `a.b.c` and a value, in bounds however deep a file goes."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from online_dpo.dashboard.group import text_of

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 4, 50, 50, 500, 500

MOST_ENTRIES, DEEPEST, LONGEST_VALUE = 2000, 8, 2000


def flat(value: Any) -> dict[str, str]:
    """The entries of nested objects by their path.

    >>> flat({"reward": {"weight": 0.5}, "beta": 0.1})
    {'reward.weight': '0.5', 'beta': '0.1'}
    """
    found: dict[str, str] = {}
    for name, entry in _entries(value, "", 0):
        if len(found) >= MOST_ENTRIES:
            break
        found[name] = entry
    return found


def _entries(value: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and depth < DEEPEST:
        for name, entry in value.items():
            yield from _entries(entry, f"{path}.{name}" if path else str(name), depth + 1)
    elif isinstance(value, list) and depth < DEEPEST and any(isinstance(entry, (dict, list)) for entry in value):
        for place, entry in enumerate(value):
            yield from _entries(entry, f"{path}[{place}]", depth + 1)
    else:
        yield path[:LONGEST_VALUE], shown(value)


def shown(value: Any) -> str:
    """A value as a settings file writes it, and no longer than a table has room for."""
    if isinstance(value, (dict, list)):
        value = _SHORT.repr(value)
    words = {None: "null", True: "true", False: "false"}
    is_word = value is None or isinstance(value, bool)
    text = words[value] if is_word else value if isinstance(value, str) else str(value)
    return text_of(text[:LONGEST_VALUE])


@dataclass(frozen=True)
class Difference:
    """A setting of several runs; ``None`` where a run has none.

    >>> Difference("beta", ("0.1", None))
    """

    name: str
    values: tuple[str | None, ...]

    @property
    def is_equal(self) -> bool:
        return len(set(self.values)) == 1


def compared(all_settings: Sequence[dict[str, str]]) -> list[Difference]:
    """All settings of several runs side by side, those that differ first."""
    names = sorted({name for settings in all_settings for name in settings})
    rows = [Difference(name, tuple(settings.get(name) for settings in all_settings)) for name in names]
    return sorted(rows, key=lambda row: row.is_equal)
