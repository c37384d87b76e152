"""What the processes of a run print: the first rank's as if it ran here, the others' with their name, all in files."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from online_dpo.runs.directory import append_event
from online_dpo.runs.endings import End
from online_dpo.runs.events import Event, Kind
from online_dpo.runs.state import state_of

FOLDER = "ray"
"""The folder in ``output_dir`` that holds a log of each process."""
TAIL = 15


def rank_name(rank: int) -> str:
    """The name of a process that trains, in messages and of its log."""
    return f"rank {rank}"


def server_name(number: int) -> str:
    """The name of a server, in messages and of its log."""
    return f"server {number}"


class Logs:
    """Prints lines and writes them into files. With ``tells_record``, once processes train, what the command itself
    tells of is in the events of the run as well.

    Args:
        folder: of the files, in the folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tells_record = False
        self._files: dict[str, IO[str]] = {}
        self._ends: dict[str, deque[str]] = {}

    def tell(self, text: str, kind: Kind | None = None) -> None:
        """Prints a line of the command itself. If it is an event of the run, ``kind`` says what it is about."""
        print(f"ray: {text}", file=sys.stderr, flush=True)
        if kind is not None and self.tells_record:
            with suppress(OSError):  # it has been printed
                append_event(self.folder.parent, Event(kind, text))

    def end(self, end: End) -> None:
        """Writes how the run has ended, where none of its processes could."""
        if self.tells_record and state_of(self.folder.parent) in ("running", "lost"):
            with suppress(OSError):
                facts = {"code": end.code, "state": end.state}
                append_event(self.folder.parent, Event("end", end.message, facts))

    def of_rank(self, rank: int, lines: Iterable[tuple[int, str]]) -> None:
        """Takes lines of a process that trains, each with the number of its stream."""
        for stream, line in lines:
            self._write(rank_name(rank), line)
            if rank == 0:
                print(line, file=sys.stderr if stream == 2 else sys.stdout, flush=True)
            elif line.strip():
                print(f"[{rank_name(rank)}] {line}", file=sys.stderr, flush=True)

    def of_server(self, number: int, lines: Iterable[tuple[int, str]]) -> None:
        """Takes lines of a server, which are shown only where it fails."""
        for _, line in lines:
            self._write(server_name(number), line)

    def end_of(self, name: str) -> str:
        """The last lines that a process has printed, each indented."""
        return "".join(f"\n    {line}" for line in self._ends.get(name, ()))

    def path_of(self, name: str) -> Path:
        """The file with all lines of a process."""
        return self.folder / f"{name.replace(' ', '-')}.log"

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def _write(self, name: str, line: str) -> None:
        if name not in self._files:
            self._files[name] = self.path_of(name).open("a", encoding="utf-8")
            self._ends[name] = deque(maxlen=TAIL)
        self._ends[name].append(line)
        self._files[name].write(f"{line}\n")
        self._files[name].flush()
