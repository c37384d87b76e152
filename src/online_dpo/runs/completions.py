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
        self._number = max((file.number for file in self._own() if file.rank == rank), default=0)
        self.file = self._opened()
        """The one that is written to. It is made with the first frame."""

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the groups of a step.

        Raises:
            OSError: they could not be written yet; they wait.
        """
        frame = encode(rows)
        try:
            self._begin_next_if_full(len(frame))
            self._make_room(len(frame))
        finally:  # whatever of this fails, the frame is written, or waits
            self.file.add(frame)

    def _begin_next_if_full(self, size: int) -> None:
        """Begins the next file, where the present one is full and nothing waits for it."""
        if self.file.size and self.file.size + size > self._largest and not self.file.backlog:
            self.file.sync()
            self.file.close()
            self._number += 1
            self.file = self._opened()

    @property
    def _present(self) -> CompletionsFile:
        return CompletionsFile(self._rank, self._number)

    def _opened(self) -> GrowingFile:
        path = self._path(self._present)
        return GrowingFile(path, opens=path.exists())

    def _make_room(self, size: int) -> None:
        """Removes the oldest files of this rank, and on the first rank those of ranks that are gone."""
        sizes = {file: self._path(file).stat().st_size for file in self._own()}
        removed = []
        for file in sorted(sizes.keys() - {self._present}, key=lambda file: (file.rank == self._rank, file)):
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
