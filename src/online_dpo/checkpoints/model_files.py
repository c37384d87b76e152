"""Puts a model's files into a folder where another model's files may be, without a moment in which both are mixed.

All files are written into ``.model.partial`` first. If one file alone differs from what is there, such as the weights
of the same model some steps later, renaming it is enough: a killed process leaves the old model or the new one. If more
do, the file without which nothing loads (``config.json`` or ``adapter_config.json``) goes first and comes last. A run
that is killed in between leaves a folder that does not load; the next save or run in that folder ends the work.
"""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from online_dpo.checkpoints.files import discard, sync
from online_dpo.checkpoints.manifest import Manifest, entries_of, files_in, manifest_of
from online_dpo.checkpoints.writer import with_free_space
from online_dpo.errors import CheckpointError

ASIDE = ".model.partial"
NOT_LOADED = ("training_args.bin", "README.md", "trainer_state.json")
"""Files that stand beside a model; which one is there does not change what is loaded."""
FULL = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
ADAPTER = re.compile(r"adapter_model\.(safetensors|bin)|adapter_config\.json")
ENTRANCES = ("config.json", "adapter_config.json")
"""A loader looks for these first."""


@contextmanager
def replacing_model(folder: Path) -> Iterator[Path]:
    """Yields a folder to write a model's files to; at the end they are in ``folder``.

    Raises:
        CheckpointError: a file could not be written; ``folder`` is as it was.
    """
    aside = folder / ASIDE
    try:
        finish_model(folder)
        aside.mkdir(parents=True)
        yield aside
        _seal(aside)
    except Exception as error:
        text = with_free_space(error, folder)
        discard(aside)
        raise CheckpointError(
            f"The model could not be saved in {folder}: {text}. What was there is as it was."
        ) from error
    except BaseException:
        discard(aside)
        raise
    try:
        finish_model(folder)
    except OSError as error:
        raise CheckpointError(
            f"The model could not be put in its place: {with_free_space(error, folder)}. Its files are whole in "
            f"{aside} and {folder}; the next run or save in that folder puts the rest in place."
        ) from error


def finish_model(folder: Path) -> None:
    """Moves the files of a model that is whole aside into the folder. Called again after a kill, it goes on."""
    aside = folder / ASIDE
    manifest = manifest_of(aside)
    if manifest is None:
        discard(aside)
        return
    moving = [name for name in files_in(aside) if not _is_same(aside / name, folder / name)]
    stale = _stale(folder, manifest)
    if len([name for name in moving if name not in NOT_LOADED]) + len(stale) > 1:
        for name in ENTRANCES:
            if name in manifest.files or name in stale:
                (folder / name).unlink(missing_ok=True)
        moving = [name for name in files_in(aside) if name in moving or name in ENTRANCES]
        sync(folder)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    for name in sorted(moving, key=lambda name: name in ENTRANCES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / name, folder / name)
    for name in {str(Path(name).parent) for name in moving}:
        sync(folder / name)
    sync(folder)
    discard(aside)


def _seal(aside: Path) -> None:
    """Says that the files aside are all there, once they are on the disk."""
    Manifest(step=0, world_size=1, sequence=0, files=entries_of(aside, files_in(aside))).write(aside)
    sync(aside)


def _is_same(new: Path, old: Path) -> bool:
    """Whether a file would be replaced by an equal one. Weights are not compared, since that takes long."""
    return old.is_file() and FULL.fullmatch(new.name) is None and filecmp.cmp(new, old, shallow=False)


def _stale(folder: Path, manifest: Manifest) -> list[str]:
    """Weights of another model in this folder that a loader would prefer or mix in. An adapter may stand beside the
    weights of its base, so it replaces adapters alone.
    """
    is_full = any(FULL.fullmatch(name) for name in manifest.files)
    of_others = (FULL, ADAPTER) if is_full else (ADAPTER,) if any(map(ADAPTER.fullmatch, manifest.files)) else ()
    names = [path.name for path in folder.iterdir() if path.is_file() and path.name not in manifest.files]
    return sorted(name for name in names if any(pattern.fullmatch(name) for pattern in of_others))
