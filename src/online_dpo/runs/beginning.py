"""Prepares a folder for the record of a run: that of an earlier run goes aside, and one that goes on is cut."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from online_dpo.errors import OnlineDPOError
from online_dpo.runs.cutting import Cut, cut_after
from online_dpo.runs.layout import (
    EARLIER,
    ENVIRONMENT,
    EVENTS,
    METRICS,
    QUESTIONS,
    SETTINGS,
    SETTINGS_BESIDE,
    VOTES,
    completions_files,
)
from online_dpo.runs.written import SESSIONS, is_ours

KEYS = {METRICS: {"step", "time", "kind"}, EVENTS: {"time", "kind", "rank"}, ENVIRONMENT: {SESSIONS}}
"""Keys of the first object in a file of ours: other programs use such names as well."""
_MOVING = ".moving"
LONGEST_LINE = 1 << 20
"""Bytes that are looked at of a file that may be of another program."""


class ForeignFileError(OnlineDPOError, ValueError):
    """A file of another program stands where the record of a run would be written. The message names it."""


def begin_anew(folder: Path) -> int | None:
    """Moves the record of an earlier run into ``earlier/<n>``, and returns n; ``None`` if there was none.

    Raises:
        ForeignFileError: a file that would be written to is not of a run's record.
        OSError: a file cannot be moved.
    """
    check_own(folder)
    names = list(_record(folder))
    aside = folder / EARLIER / _MOVING  # there already, where a process was killed while it did this
    if not names and not aside.is_dir():
        return None
    aside.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.rename(folder / name, aside / name)
    number = 1 + max((int(path.name) for path in aside.parent.iterdir() if path.name.isdigit()), default=0)
    os.rename(aside, aside.with_name(str(number)))
    return number


def go_on(folder: Path, step: int) -> Cut:
    """Cuts the record in a folder off after the step that a run is resumed from.

    Raises:
        ForeignFileError: a file that would be written to is not of a run's record.
        OSError: a file cannot be read or cut.
    """
    check_own(folder)
    return cut_after(folder, step)


def check_own(folder: Path) -> None:
    """Checks that what stands where a run's record is written is such a record.

    Raises:
        ForeignFileError: it is something else.
    """
    for name, keys in KEYS.items():
        path = folder / name
        if path.is_symlink() or (path.exists() and not (path.is_file() and _begins_with(path, keys))):
            raise ForeignFileError(
                f"{path} is not of a run's record, which would be written there. Move it, give another `output_dir`, "
                "or set `run_folder: false`."
            )


def _begins_with(path: Path, keys: set[str]) -> bool:
    """Whether the first object in a file has these keys. One that is empty, torn or zeros, as a disk may leave it, may
    be ours.
    """
    content = path.read_bytes() if path.name == ENVIRONMENT else _first_line(path)
    try:
        first = json.loads(content)
    except ValueError:
        return not content.strip(b"\0 \n") or content.lstrip().startswith(b"{")
    return isinstance(first, dict) and keys <= first.keys()


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline(LONGEST_LINE)


def _record(folder: Path) -> Iterator[str]:
    """The names of the files of a record in a folder."""
    if not folder.is_dir():
        return
    for name in (METRICS, EVENTS, ENVIRONMENT, VOTES, QUESTIONS):
        if (folder / name).is_file():
            yield name
    yield from (name for name in (SETTINGS, SETTINGS_BESIDE) if is_ours(folder / name))
    yield from (file.name for file in completions_files(folder))
