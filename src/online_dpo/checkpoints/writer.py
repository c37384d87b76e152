"""Writes checkpoints aside, and puts each one in its place when every process has written its part of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from online_dpo.checkpoints.files import sync
from online_dpo.checkpoints.folders import (
    aside_of,
    by_age,
    discard_aside,
    folder_of,
    put_in_place,
    recover,
)
from online_dpo.checkpoints.manifest import Entry, Manifest, entries_of, files_in, manifest_of
from online_dpo.distributed.collectives import from_every_rank, processes_of_run, world_size
from online_dpo.errors import CheckpointError, named_error

OF_RANK = re.compile(r"(?:^|/)(?:rng_state_|lookahead-|metrics-|shard-)(\d+)")
"""Names of files that each process writes for itself: of transformers and of this package."""


@dataclass(frozen=True)
class Role:
    """What a process does for a checkpoint.

    ``publishes`` is set on the process that gives the folder its name; ``publisher`` is the rank of that process: 0, or
    with ``save_on_each_node`` the first rank of the node.
    """

    rank: int
    publishes: bool
    publisher: int = 0


@dataclass
class Facts:
    """What a manifest says beside its files; to be filled while the checkpoint is written."""

    versions: dict[str, str] = field(default_factory=dict)
    finite: bool = True
    extra: dict[str, Any] = field(default_factory=dict)


class CheckpointWriter:
    """Writes one checkpoint after the other. A process that fails in its part makes all fail, and none waits.

    ``aside`` is the folder that stands for the run's folder while a checkpoint is written, else ``None``.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.aside: Path | None = None
        self._problem: Exception | None = None

    @contextmanager
    def writing(self, run_dir: Path, step: int, facts: Facts) -> Iterator[Path]:
        """Yields the folder to write to; at the end the checkpoint has its name. A collective operation.

        Raises:
            CheckpointError: on every process, if any of them could not write; the folder has not changed.
        """
        folder = folder_of(run_dir, step)
        self._problem = None
        try:
            with self.recording():
                self._prepare(folder)
            self._agree(folder, None)
            self.aside = aside_of(folder).parent
            with self.recording():
                yield aside_of(folder)
            self.aside = None
            parts = self._agree(folder, self._own_entries(aside_of(folder)))
            with self.recording():
                self._publish(folder, parts, facts)
            self._agree(folder, None)
        finally:
            self.aside = None
            if self.role.publishes:
                discard_aside(folder)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Stores the first error of this process inside `writing`, because the other processes go on to wait for this
        one; `writing` ends all of them later. Outside of it, errors are raised.
        """
        try:
            yield
        except Exception as error:
            self._problem = self._problem or error

    @contextmanager
    def part(self) -> Iterator[None]:
        """As `recording` while a checkpoint is written; at other times errors are raised."""
        if self.aside is None:
            yield
            return
        with self.recording():
            yield

    def _prepare(self, folder: Path) -> None:
        if self.role.publishes:
            folder.parent.mkdir(parents=True, exist_ok=True)
            recover(folder.parent)
            aside_of(folder).mkdir(parents=True)

    def _own_entries(self, aside: Path) -> dict[str, Entry]:
        """Sizes and hashes of the files that this process answers for."""
        with self.recording():
            if aside.is_dir():  # not on a node that writes nothing
                return entries_of(aside, [name for name in files_in(aside) if self._is_own(name)])
        return {}

    def _is_own(self, name: str) -> bool:
        if world_size() == 1:
            return self.role.publishes
        if name.rpartition("/")[2].startswith(".tmp"):  # safetensors writes there, for a process that is not done yet
            return False
        found = OF_RANK.search(name)
        if found is not None and int(found[1]) < world_size():
            return int(found[1]) == self.role.rank
        return self.role.publishes

    def _agree(self, folder: Path, entries: Mapping[str, Entry] | None) -> list[tuple[int, Mapping[str, Entry]]]:
        """Returns what every process has written, with its publisher; raises on every process if any has failed."""
        problem = None if self._problem is None else with_free_space(self._problem, folder.parent)
        parts = from_every_rank((self.role.publisher, problem, entries or {}))
        for rank, (_, text, _) in enumerate(parts):
            if text is not None:
                who = f" (process {rank} of {len(parts)})" if len(parts) > 1 else ""
                raise CheckpointError(
                    f"{folder.name} could not be saved in {folder.parent}: {text}{who}. Nothing is left of it, and "
                    f"earlier checkpoints are as they were. {_advice(folder)}"
                ) from self._problem
        return [(publisher, own) for publisher, _, own in parts]

    def _publish(self, folder: Path, parts: list[tuple[int, Mapping[str, Entry]]], facts: Facts) -> None:
        """Writes the manifest, and gives the folder its name."""
        if not self.role.publishes:
            return
        aside = aside_of(folder)
        files = {name: e for publisher, own in parts if publisher == self.role.publisher for name, e in own.items()}
        for name in files:
            if not (aside / name).is_file():
                raise FileNotFoundError(
                    f"{name} of another process is not in this process's {folder.parent}. All processes must write "
                    "into one shared folder; where each machine has its own disk, set `save_on_each_node`"
                )
        before = [manifest_of(path) for path in by_age(folder.parent)[-1:]]
        sequence = 1 + max((manifest.sequence for manifest in before if manifest is not None), default=0)
        manifest = Manifest(int(folder.name.rpartition("-")[2]), processes_of_run(), sequence, files, **vars(facts))
        manifest.write(aside)
        for path in (aside.parent, aside, *(path for path in aside.rglob("*") if path.is_dir())):
            sync(path)
        put_in_place(folder)


def with_free_space(error: Exception, folder: Path) -> str:
    """An error that came while files were written, with the space on that disk: torch does not say that it is full."""
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
    return f"{named_error(error, first_line=True)} ({free / 1e6:.1f} MB are free there)"


def _advice(folder: Path) -> str:
    earlier = by_age(folder.parent)
    return f"Mend this, then resume from {earlier[-1]}." if earlier else "There is no earlier one."
