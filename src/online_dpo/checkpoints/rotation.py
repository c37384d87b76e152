"""Which old checkpoints go, with ``save_total_limit``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from online_dpo.checkpoints.folders import by_age, checkpoints_in, remove
from online_dpo.checkpoints.manifest import manifest_of, problem_of

logger = logging.getLogger(__name__)


def rotate(run_dir: Path, limit: int | None, best: str | None) -> list[str]:
    """Deletes the checkpoints that were written first, until ``limit`` are left (``None`` or 0: all stay). Returns the
    names of those that are gone.

    The newest one stays, which has just been written, and the best one; also the newest whole and finite one.
    """
    if not limit or limit < 0:
        return []
    present, kept = _oldest_first(run_dir), _protected(run_dir, best)
    excess = len(present) - max(limit, len(kept))
    return _remove([folder for folder in present if folder not in kept][: max(excess, 0)])


def keep_only(run_dir: Path, best: str) -> list[str]:
    """Deletes all checkpoints but the best one, unless that one is not whole or not finite. Returns their names."""
    kept = _named(run_dir, best)
    if kept and _is_finite(kept[0]) and problem_of(kept[0]) is None:
        return _remove(folder for folder in checkpoints_in(run_dir) if folder not in kept)
    return []


def _oldest_first(run_dir: Path) -> list[Path]:
    """Those without a manifest that can be read were written by an older version, or are damaged: they go first."""
    known = by_age(run_dir)
    return [folder for folder in checkpoints_in(run_dir) if folder not in known] + known


def _protected(run_dir: Path, best: str | None) -> set[Path]:
    """The newest one, which has just been written, the best one, and the newest that is finite and whole."""
    newest_first = list(reversed(by_age(run_dir)))
    kept = {*newest_first[:1], *_named(run_dir, best)}
    if newest_first and not _is_finite(newest_first[0]):
        others = (folder for folder in newest_first[1:] if _is_finite(folder) and problem_of(folder) is None)
        kept |= {folder for folder in [next(others, None)] if folder is not None}
    return kept


def _named(run_dir: Path, best: str | None) -> list[Path]:
    """The best checkpoint, if it is in this folder."""
    return [folder for folder in checkpoints_in(run_dir) if best and os.path.isdir(best) and folder.samefile(best)]


def _is_finite(folder: Path) -> bool:
    manifest = manifest_of(folder)
    return manifest is not None and manifest.finite


def _remove(folders: Iterable[Path]) -> list[str]:
    removed = []
    for folder in folders:
        try:
            remove(folder)
        except OSError as error:
            logger.warning("%s could not be removed (`save_total_limit`): %s", folder, error)
        else:
            removed.append(folder.name)
    return removed
