"""The folders of a run's checkpoints: their names, how one takes its place and goes, and what a killed process left.

A checkpoint is written into ``.checkpoint-3.partial/checkpoint-3`` and renamed to ``checkpoint-3`` when it is whole.
One that goes, or is replaced, is renamed to ``.checkpoint-3.removed`` before its files are deleted. So a folder named
``checkpoint-3`` is whole at all times.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from online_dpo.checkpoints.files import delete, discard, sync
from online_dpo.checkpoints.manifest import manifest_of, problem_of

NAME = re.compile(r"checkpoint-(\d+)")
LEFTOVER = re.compile(r"\.(checkpoint-\d+)\.(partial|removed)")


def folder_of(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run_dir / f"checkpoint-{step}"


def aside_of(folder: Path) -> Path:
    """Where the checkpoint of this folder is while it is written."""
    return _beside(folder, "partial") / folder.name


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.rpartition("-")[2])


def checkpoints_in(run_dir: Path) -> list[Path]:
    """The folders named as checkpoints, by step; also one that had lost its name to a newer one, which had none yet
    when the process was killed (see `located`).
    """
    if not run_dir.is_dir():
        return []
    names = {path.name for path in run_dir.iterdir() if NAME.fullmatch(path.name) and path.is_dir()}
    removed = (found[1] for path in run_dir.iterdir() if (found := LEFTOVER.fullmatch(path.name)))
    names |= {name for name in removed if located(run_dir / name) != run_dir / name}
    return sorted((run_dir / name for name in names), key=step_of)


def by_age(run_dir: Path) -> list[Path]:
    """The checkpoints of a folder whose manifest can be read, in the order in which they were written."""
    manifests = {folder: manifest_of(located(folder)) for folder in checkpoints_in(run_dir)}
    readable = {folder: manifest for folder, manifest in manifests.items() if manifest is not None}
    return sorted(readable, key=lambda folder: (readable[folder].sequence, readable[folder].step))


def located(folder: Path) -> Path:
    """Where the files of a checkpoint are now: in ``folder``, or aside, if the process was killed while the newer one
    of the same step took the place of an older one: between the two renames.
    """
    aside = aside_of(folder)
    between = not folder.is_dir() and _beside(folder, "removed").is_dir() and aside.is_dir()
    return aside if between and problem_of(aside) is None else folder


def put_in_place(folder: Path) -> None:
    """Renames a checkpoint that is whole from aside to its folder, in whose place there may be another one."""
    aside, old = aside_of(folder), _beside(folder, "removed")
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        discard(old)
        os.rename(folder, old)
    os.rename(aside, folder)
    sync(folder.parent)
    discard(aside.parent)
    discard(old)


def remove(folder: Path) -> None:
    """Deletes a checkpoint, which loses its name first."""
    gone = _beside(folder, "removed")
    discard(gone)
    os.rename(folder, gone)
    sync(folder.parent)
    delete(gone)


def discard_aside(folder: Path) -> None:
    """Deletes what was written aside for a checkpoint."""
    discard(aside_of(folder).parent)


def recover(run_dir: Path) -> None:
    """Ends what a killed process has left half done: a checkpoint between two renames gets its name, and all else aside
    is deleted.
    """
    if not run_dir.is_dir():
        return
    for name in sorted({found[1] for path in run_dir.iterdir() if (found := LEFTOVER.fullmatch(path.name))}):
        folder = run_dir / name
        if located(folder) != folder:
            put_in_place(folder)
        discard_aside(folder)
        discard(_beside(folder, "removed"))


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")
