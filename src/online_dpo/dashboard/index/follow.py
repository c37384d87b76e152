"""Follows files of a run folder while a run writes into them, and notices when it has cut one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from online_dpo.runs.layout import CompletionsFile, completions_files
from online_dpo.runs.opening import open_regular
from online_dpo.runs.reading import RunFolder, StepFrame, read_lines

PIECE = 1 << 20
"""Bytes that are read at once."""

MARK = 64
"""Bytes before the place up to which a file was read, that are compared before reading on."""


class FollowedFile:
    """A file of JSON lines, read from where it was left.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.end = 0
        self.is_whole = False
        """Whether the last `read` came to the end of the file."""

        self._path = path
        self._mark = b""

    def read(self) -> list[dict[str, Any]] | None:
        """The next rows; ``None`` if the file is not the one any more of which the former rows were read."""
        if bytes_before(self._path, self.end) != self._mark:
            return None
        size = size_of(self._path)
        lines = read_lines(self._path, self.end, PIECE)
        self.is_whole = size - self.end <= PIECE
        if lines.end != self.end:
            self.end, self._mark = lines.end, bytes_before(self._path, lines.end)
        return lines.rows


class FollowedFrames:
    """The completions files of a run folder, read frame by frame from where they were left.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.size, self.done = 0, 0
        """Bytes of the files, and of what was read of them."""

        self._folder = folder
        self._ends: dict[CompletionsFile, int] = {}
        self._marks: dict[CompletionsFile, bytes] = {}
        self._sizes: dict[CompletionsFile, int] = {}

    def look(self) -> list[CompletionsFile]:
        """Look at the folder; returns the files of which nothing that was read holds any more."""
        there = self._files()
        void = [
            file
            for file in self._ends
            if file not in there or bytes_before(self._folder.path / file.name, self._ends[file]) != self._marks[file]
        ]
        for file in void:
            del self._ends[file], self._marks[file]
        self._sizes = there
        self._count()
        return void

    def settle(self) -> None:
        """Remember what stands before the places up to which files were read, to notice when that changes."""
        for file, end in self._ends.items():
            if file not in self._marks:
                self._marks[file] = bytes_before(self._folder.path / file.name, end)

    def _files(self) -> dict[CompletionsFile, int]:
        sizes = {}
        try:
            for file in completions_files(self._folder.path):
                sizes[file] = (self._folder.path / file.name).lstat().st_size
        except OSError:  # the folder, or the file, was removed a moment ago
            return sizes
        return sizes

    def new(self) -> Iterator[StepFrame]:
        """The frames that were not read yet; `settle` comes after them."""
        for file, size in self._sizes.items():
            for at in self._folder.frames(file, self._ends.get(file, 0)):
                self._ends[file] = at.frame.end
                self._marks.pop(file, None)
                self._count()
                yield at
            # what is torn at the end, or no frame, is as good as read until the file changes
            self.done += size - self._ends.get(file, 0)

    def _count(self) -> None:
        self.size = sum(self._sizes.values())
        self.done = sum(self._ends.get(file, 0) for file in self._sizes)


def size_of(path: Path) -> int:
    """The bytes of a file; 0 where there is none."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def bytes_before(path: Path, end: int) -> bytes:
    """The bytes before a place in a file; fewer where it is shorter."""
    start = max(0, end - MARK)
    try:
        with open_regular(path) as file:
            file.seek(start)
            return file.read(end - start)
    except OSError:
        return b""
