"""Reads run folders, also while a run writes into them: what is torn at the end of a file is not there yet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from online_dpo.runs import frames
from online_dpo.runs.frames import Frame
from online_dpo.runs.layout import (
    ENVIRONMENT,
    EVENTS,
    METRICS,
    SETTINGS,
    SETTINGS_BESIDE,
    VOTES,
    CompletionsFile,
    completions_files,
)
from online_dpo.runs.opening import open_regular, read_small

LARGEST_SETTINGS = 1 << 18
LARGEST_ENVIRONMENT = 1 << 22
"""Bytes of these files that are read: more than a run writes."""

Row = dict[str, Any]

# libyaml, which PyYAML has where it was built with it, takes a tenth of the time
_QUICK_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


@dataclass(frozen=True)
class Lines:
    """Rows of a file, and the byte from which the next ones will be read.

    >>> Lines(rows=[{"step": 1, "loss": 0.69}], end=25)
    """

    rows: list[Row]
    end: int


@dataclass(frozen=True)
class StepFrame:
    """A frame of completions: the groups of one step of one rank.

    >>> StepFrame(CompletionsFile(rank=0, number=0), Frame(0, 1830))
    """

    file: CompletionsFile
    frame: Frame


class RunFolder:
    """A folder into which a run has written, or is writing.

    Args:
        path: the run's ``output_dir``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def settings(self) -> Row:
        """The settings of the run as it resolved them; empty where they cannot be read."""
        for name in (SETTINGS_BESIDE, SETTINGS):
            try:
                read = yaml.load(read_small(self.path / name, LARGEST_SETTINGS), _QUICK_LOADER)  # nosec B506: a safe loader
            except (OSError, ValueError, RecursionError, yaml.YAMLError):
                continue
            return read if isinstance(read, dict) else {}
        return {}

    @property
    def environment(self) -> Row:
        """Versions, devices and the like; empty where they cannot be read."""
        try:
            read = json.loads(read_small(self.path / ENVIRONMENT, LARGEST_ENVIRONMENT))
        except (OSError, ValueError, RecursionError):
            return {}
        return read if isinstance(read, dict) else {}

    def metrics(self, start: int = 0, most: int | None = None) -> Lines:
        """The rows of metrics from a byte on."""
        return read_lines(self.path / METRICS, start, most)

    def events(self, start: int = 0, most: int | None = None) -> Lines:
        """The events from a byte on."""
        return read_lines(self.path / EVENTS, start, most)

    def votes(self, start: int = 0, most: int | None = None) -> Lines:
        """People's votes from a byte on."""
        return read_lines(self.path / VOTES, start, most)

    def frames(self, file: CompletionsFile, start: int = 0) -> Iterator[StepFrame]:
        """Where the steps of a file lie, from a byte on."""
        try:
            for frame in frames.frames(self.path / file.name, start):
                yield StepFrame(file, frame)
        except OSError:  # it was rotated out, or is no regular file
            return

    def all_frames(self) -> Iterator[StepFrame]:
        """Where all steps of all ranks lie."""
        for file in completions_files(self.path):
            yield from self.frames(file)

    def groups(self, at: StepFrame) -> list[Row]:
        """The groups of a step.

        Raises:
            ValueError: the frame is damaged.
            OSError: the file is not there any more.
        """
        return frames.read(self.path / at.file.name, at.frame)

    def check(self, at: StepFrame) -> None:
        """Reads a step to its end, and keeps nothing of it.

        Raises:
            ValueError: the frame is damaged.
            OSError: the file is not there any more.
        """
        frames.check(self.path / at.file.name, at.frame)

    def each_group(self, at: StepFrame) -> Iterator[Row | None]:
        """The groups of a step one by one, for little memory; ``None`` for one that cannot be read.

        Raises:
            ValueError: the frame is damaged.
            OSError: the file is not there any more.
        """
        return frames.each(self.path / at.file.name, at.frame)


def read_lines(path: Path, start: int = 0, most: int | None = None) -> Lines:
    """The whole lines of a file of JSON objects from a byte on; none where there is no file. Lines that are no JSON
    objects are left out.

    Args:
        path: the file.
        start: the byte from which to read.
        most: read at most so many bytes in this call, and leave out lines that are longer.
    """
    try:
        with open_regular(path) as file:
            file.seek(start)
            content = file.read() if most is None else file.read(most)
    except OSError:
        return Lines([], start)
    whole, newline, rest = content.rpartition(b"\n")
    if not newline and len(rest) == most:
        return Lines([], start + len(rest))
    rows = [row for line in whole.split(b"\n") if isinstance(row := _object(line), dict)]
    return Lines(rows, start + len(whole) + len(newline))


def _object(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
