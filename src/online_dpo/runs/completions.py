"""Writes the groups of a rank, one frame for each step, into files that are rotated and together stay below a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from online_dpo.runs import events
from online_dpo.runs.appending import GrowingFile
from online_dpo.runs.frames import encode
from online_dpo.runs.layout import CompletionsFile, completions_files

LARGEST_FILE = 64_000_000
FILES_AT_LEAST = 4
"""With a small limit, files are smaller: when the oldest one goes, most of what is kept stays."""


class CompletionsWriter:
    """The files of completions of one rank.

    Args:
        folder: the run folder.
        rank: this process, and ``processes`` how many there are: each may take its part of the limit.
        limit: the most bytes that the files of all ranks may take.
    """

    def __init__(self, folder: Path, rank: int, processes: int, limit: int) -> None:
        self._folder, self._rank, self._processes = folder, rank, processes
        self._limit = max(1, limit // processes)
        self._largest = max(1, min(LARGEST_FILE, self._limit // FILES_AT_LEAST))
        self._file: GrowingFile | None = None
        self._number = max((file.number for file in self._own()), default=0)

    @property
    def files(self) -> list[GrowingFile]:
        """The file that is written to, if there is one yet."""
        return [] if self._file is None else [self._file]

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the groups of a step.

        Raises:
            OSError: they could not be written yet; they wait.
        """
        frame = encode(rows)
        file = self._file_for(len(frame))
        self._make_room(len(frame))
        file.add(frame)

    def _file_for(self, size: int) -> GrowingFile:
        """The file to write to: the next one, where the present one is full and nothing waits for it."""
        if self._file is None:
            self._file = self._opened()
        if self._file.size and self._file.size + size > self._largest and not self._file.backlog:
            self._file.sync()
            self._file.close()
            self._number += 1
            self._file = self._opened()
        return self._file

    def _opened(self) -> GrowingFile:
        return GrowingFile(self._path(CompletionsFile(self._rank, self._number)))

    def _make_room(self, size: int) -> None:
        """Removes the oldest files of this rank, and on the first rank those of ranks that are gone."""
        sizes = {file: self._path(file).stat().st_size for file in self._own()}
        removed = []
        for file in sorted(sizes, key=lambda file: (file.rank == self._rank, file))[:-1]:
            if sum(sizes.values()) + size <= self._limit:
                break
            self._path(file).unlink()
            removed.append(file.name)
            del sizes[file]
        if removed:
            events.emit(
                "record",
                f"{', '.join(removed)} went, the oldest completions: `log_completions_max_mb` is reached.",
                files=removed,
            )

    def _own(self) -> list[CompletionsFile]:
        of_gone = self._rank == 0
        return [
            file
            for file in completions_files(self._folder)
            if file.rank == self._rank or (of_gone and file.rank >= self._processes)
        ]

    def _path(self, file: CompletionsFile) -> Path:
        return self._folder / file.name
