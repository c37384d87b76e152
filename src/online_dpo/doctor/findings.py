"""What a check has found. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Mark = Literal["ok", "warning", "problem", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check has found.

    >>> problem("there are 3 GiB free, a checkpoint needs 5 GiB", "Lower `save_total_limit`.")

    ``found`` says what is there, ``change`` what to change; ``lines`` are shown beneath it, such as a histogram;
    ``facts`` are numbers for ``--json``. ``check`` is the name of the check, which its runner fills in.
    """

    mark: Mark
    found: str
    change: str = ""
    lines: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    check: str = ""


def ok(found: str, *, lines: tuple[str, ...] = (), **facts: Any) -> Finding:
    """Returns a finding that all is well."""
    return Finding("ok", found, "", lines, facts)


def warning(found: str, change: str, *, lines: tuple[str, ...] = (), **facts: Any) -> Finding:
    """Returns a finding that is likely to be a mistake, or costs time; the run would go on."""
    return Finding("warning", found, change, lines, facts)


def problem(found: str, change: str, *, lines: tuple[str, ...] = (), **facts: Any) -> Finding:
    """Returns a finding with which the run fails, or trains nothing of use."""
    return Finding("problem", found, change, lines, facts)


def gib(size: float) -> str:
    """A number of bytes as text.

    >>> gib(3 * 2**30), gib(5_000_000)
    ('3.0 GiB', '5 MiB')
    """
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB" if size < 100 * 2**30 else f"{size / 2**30:.0f} GiB"
    return f"{size / 2**20:.0f} MiB"
