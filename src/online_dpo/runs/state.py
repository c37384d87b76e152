"""Says whether a run goes on, and how it ended otherwise, from the events in its folder."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import psutil

from online_dpo.runs.endings import State
from online_dpo.runs.layout import EVENTS, METRICS, completions_files
from online_dpo.runs.reading import RunFolder

SAME_PROCESS = 10.0
"""Seconds by which the start of a process may seem to move when the clock is set."""
STATES: tuple[State, ...] = get_args(State)
QUIET = 24 * 3600.0
"""Seconds without a write after which a run on another machine counts as lost."""


def state_of(folder: str | Path) -> State:
    """The state of the run that has written into a folder last. One without an end goes on while its first process is
    there; that of another machine, as long as something was written within a day.
    """
    return state_from(RunFolder(folder).events().rows, Path(folder))


def state_from(rows: Iterable[Mapping[str, Any]], folder: Path) -> State:
    """As `state_of`, from events that have been read already."""
    start: Mapping[str, Any] = {}
    ends: list[Mapping[str, Any]] = []
    for row in rows:
        if row.get("kind") == "start":
            start, ends = row, []
        elif row.get("kind") == "end":
            ends.append(row)
    of_first = next((end for end in ends if end.get("rank") in (0, None)), None)  # None: of who started the processes
    if of_first is None and _goes_on(start, folder):
        return "running"
    end = of_first or (ends[0] if ends else {})
    found: list[State] = [state for state in STATES if state == end.get("state")]
    return found[0] if found else "lost"


def _goes_on(start: Mapping[str, Any], folder: Path) -> bool:
    if not start:
        return False
    if start.get("host") != socket.gethostname():
        return time.time() - _last_write(folder) < QUIET
    try:
        process = psutil.Process(start["pid"])
        same = abs(process.create_time() - start["process_started"]) < SAME_PROCESS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _last_write(folder: Path) -> float:
    names = [EVENTS, METRICS, *(file.name for file in completions_files(folder))] if folder.is_dir() else []
    times = [(folder / name).stat().st_mtime for name in names if (folder / name).is_file()]
    return max(times, default=0.0)
