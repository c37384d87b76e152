"""State of a run that a checkpoint holds beside weights and optimizer: one list of parts, each with its own file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

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
    """Saves and restores the parts of a run, in the order in which they were added.

    Args:
        parts: the first ones.
    """

    def __init__(self, *parts: Stateful) -> None:
        self._parts: list[Stateful] = [*parts]

    def add(self, *parts: Stateful) -> None:
        """Adds parts that have state."""
        self._parts.extend(parts)

    def save(self, folder: Path, rank: int) -> None:
        """Writes every part into the folder of a checkpoint; called on all ranks."""
        for part in self._parts:
            part.save(folder, rank)

    def restore(self, folder: Path, rank: int) -> None:
        """Restores every part from the folder of a checkpoint; called on all ranks. What `Needs` has let pass without
        its files (with ``resume_anyway``) starts anew.

        Raises:
            CheckpointError: a file is damaged.
        """
        for part in self._parts:
            if absent := [name for name in part.files(rank) if not (folder / name).is_file()]:
                logger.warning("%s lacks %s: what it would say starts anew.", folder, ", ".join(absent))
            else:
                part.restore(folder, rank)
