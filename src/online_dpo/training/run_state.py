"""State of a run that a checkpoint holds beside weights and optimizer: one list of parts, each with its own file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from online_dpo.errors import CheckpointError

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """A part of a run with state that a resumed run needs.

    Each part decides what it writes and on which ranks; ``rank`` 0 writes what all ranks share.
    """

    def files(self, rank: int) -> Sequence[str]:
        """Returns the names of the files that `restore` reads on this rank, with the present options."""
        ...

    def save(self, folder: Path, rank: int) -> None:
        """Writes its state into the folder of a checkpoint."""
        ...

    def restore(self, folder: Path, rank: int) -> None:
        """Goes on from what `save` wrote.

        Raises:
            CheckpointError: a file is damaged.
        """
        ...


class RunState:
    """Saves and restores the parts of a run, in the order in which they were added."""

    def __init__(self) -> None:
        self._parts: list[Stateful] = []

    def add(self, *parts: Stateful) -> None:
        """Adds parts that have state."""
        self._parts.extend(parts)

    def files(self, rank: int) -> list[str]:
        """Returns the names of the files that a checkpoint must hold for this rank."""
        return [name for part in self._parts for name in part.files(rank)]

    def check(self, folder: Path, rank: int, *, may_lack: bool) -> None:
        """Checks that a checkpoint holds the files of every part; to be called before anything of it is loaded.

        Args:
            may_lack: only warn; parts without their files start anew.

        Raises:
            CheckpointError: a file is missing.
        """
        for name in self.files(rank):
            if problem := missing(folder, name):
                if not may_lack:
                    raise CheckpointError(f"{problem} `resume_anyway: true` goes on without it.")
                logger.warning("%s What it says starts anew (`resume_anyway`).", problem)

    def save(self, folder: Path, rank: int) -> None:
        """Writes every part into the folder of a checkpoint; called on all ranks."""
        for part in self._parts:
            part.save(folder, rank)

    def restore(self, folder: Path, rank: int) -> None:
        """Restores every part whose files are there from the folder of a checkpoint; called on all ranks.

        Raises:
            CheckpointError: a file is damaged.
        """
        for part in self._parts:
            if all((folder / name).is_file() for name in part.files(rank)):
                part.restore(folder, rank)


def missing(folder: Path, name: str) -> str | None:
    """Says what is wrong if a checkpoint lacks a file; ``None`` if it is there."""
    if (folder / name).is_file():
        return None
    former = (folder / name).with_suffix(".pt")
    if former.is_file():
        return (
            f"{former} is of an earlier version of online-dpo: a pickle, which could run any code, so it is not read."
        )
    return f"{folder} lacks {name}, which this run needs: the checkpoint is not whole, or was saved with other options."
