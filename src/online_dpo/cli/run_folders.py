"""Run folders on the command line: whether a path is one, and which files in it are not to be written over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from online_dpo.runs.layout import EVENTS, METRICS, OF_ONE_NAME, completions_files, is_run_folder


def run_folder(path: Path) -> Path:
    """The path, if a run has written its record there.

    Raises:
        ValueError: it has not; the message names the run folders beneath it.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such folder.")
    if not path.is_dir():
        raise ValueError(f"{path}: this is a file. Give the output folder of a run.")
    if not is_run_folder(path) and not completions_files(path):
        inside = sorted(child for child in path.iterdir() if child.is_dir() and is_run_folder(child))
        hint = f" Run folders in it: {', '.join(map(str, inside[:5]))}." if inside else ""
        raise ValueError(f"{path}: no run has written its record here: there is no {METRICS} or {EVENTS}.{hint}")
    return path


def check_target(option: str, file: Path, folders: Sequence[Path]) -> None:
    """Check that a file can be written, and that it is not one of a run's record.

    Raises:
        ValueError: it cannot be written there.
    """
    if file.is_dir():
        raise ValueError(f"{option}: {file} is a folder. Give the name of a file.")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{option}: there is no folder {file.absolute().parent}.")
    place = file.resolve()
    if place.name in OF_ONE_NAME and any(place.parent == folder.resolve() for folder in folders):
        raise ValueError(f"{option}: {file} belongs to the record of the run. Give another name.")
