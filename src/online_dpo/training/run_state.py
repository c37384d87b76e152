"""State of a run that a checkpoint holds beside weights and optimizer: one list of parts, each with its own file."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Stateful(Protocol):
    """A part of a run with state that a resumed run needs.

    Each part decides what it writes and on which ranks; ``rank`` 0 writes what all ranks share.
    """

    def save(self, folder: Path, rank: int) -> None:
        """Writes its state into the folder of a checkpoint."""
        ...

    def restore(self, folder: Path, rank: int) -> None:
        """Goes on from what `save` wrote; from a checkpoint without it, as its class says."""
        ...


class RunState:
    """Saves and restores the parts of a run, in the order in which they were added."""

    def __init__(self) -> None:
        self._parts: list[Stateful] = []

    def add(self, *parts: Stateful) -> None:
        """Adds parts that have state."""
        self._parts.extend(parts)

    def save(self, folder: Path, rank: int) -> None:
        """Writes every part into the folder of a checkpoint; called on all ranks."""
        for part in self._parts:
            part.save(folder, rank)

    def restore(self, folder: Path, rank: int) -> None:
        """Restores every part from the folder of a checkpoint; called on all ranks."""
        for part in self._parts:
            part.restore(folder, rank)
