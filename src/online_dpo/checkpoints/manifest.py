"""The manifest of a checkpoint: every file with its size and SHA-256. It is written last, so it says that all is there.

This module loads nothing heavy: the command line checks a checkpoint before it loads a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from online_dpo.checkpoints.codec import from_json
from online_dpo.checkpoints.files import digest, synced_digest, write_text
from online_dpo.errors import one_line

FILE = "manifest.json"
FORMAT = 1
LONGEST = 64 << 20
"""Bytes of a manifest that are read; that of 1000 files has 150,000."""
THREADS = 4
"""Files that are read at the same time. hashlib releases Python's lock while it computes."""
STATE = (
    *("trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("beta.json", "guard.json", "passes.json", "reference.*", "lookahead-*", "metrics-*.json"),
    *("shards.json", "shard-*.safetensors"),
)
"""Files of a run beside its weights."""
READ_BY_NAME = (*STATE, "model.safetensors*", "pytorch_model.bin*", "adapter_model.*", "adapter_config.json")
"""Files that a resumed run reads wherever they are. Others may be added to a checkpoint, by a callback for example."""


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint.

    >>> Entry(size=9, sha256="5891b5...")
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds, and who wrote it.

    ``sequence`` counts the checkpoints that were written into a folder, in the order of writing: a clock may be wrong,
    and a run that is resumed from an earlier step writes smaller steps later. ``finite`` says whether every weight is.
    ``extra`` is for blocks of other modules; its values must be JSON.
    """

    step: int
    world_size: int
    sequence: int
    files: dict[str, Entry]
    versions: dict[str, str] = field(default_factory=dict)
    finite: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json``, with a hash of its own."""
        content = {"format": FORMAT, **asdict(self)}
        write_text(folder / FILE, json.dumps({"sha256": _hash_of(content), **content}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest of a checkpoint.

        Raises:
            ValueError: it is not as it was written, or a newer version of this package wrote it.
            FileNotFoundError: there is none.
        """
        if (folder / FILE).stat().st_size > LONGEST:
            raise ValueError(f"{FILE} is damaged")
        try:
            content = json.loads((folder / FILE).read_bytes())
            own, version = content.pop("sha256"), content.pop("format")
            is_own = own == _hash_of({"format": version, **content})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f"{FILE} is damaged") from None
        if isinstance(version, int) and version != FORMAT:
            raise ValueError(f"{FILE} has format {version}, which this version of online-dpo does not know")
        if version != FORMAT or not is_own:
            raise ValueError(f"{FILE} is damaged")
        try:
            manifest = from_json(cls, content)
        except (ValueError, RecursionError):
            raise ValueError(f"{FILE} is damaged") from None
        if outside := [name for name in manifest.files if not _is_inside(name)]:
            raise ValueError(f"{FILE} names {one_line(outside[0], 80)!r}, which is no file in this folder")
        return manifest


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file in a folder or below it, written as `files_in` does."""
    return PurePosixPath(name).as_posix() == name and not {"", "..", "/", "."} & set(PurePosixPath(name).parts or ("",))


def entries_of(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Brings these files of a folder to the disk, and returns their sizes and hashes."""

    def entry(name: str) -> tuple[str, Entry]:
        sha256 = synced_digest(folder / name)
        return name, Entry((folder / name).stat().st_size, sha256)

    with ThreadPoolExecutor(THREADS) as threads:
        return dict(threads.map(entry, sorted(names)))


def files_in(folder: Path) -> list[str]:
    """The names of all files in a folder and below it, with ``/`` between folders; without the manifest."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != FILE)


def has_manifest(folder: Path) -> bool:
    """Whether a folder holds a manifest, be it damaged or not."""
    return (folder / FILE).is_file()


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; ``None`` if there is none, or none that can be read."""
    try:
        return Manifest.read(folder)
    except (ValueError, FileNotFoundError):
        return None


def problem_of(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint: a file and what is wrong with it; ``None`` if every file is as it was
    written.
    """
    if not has_manifest(folder):
        return f"it has no {FILE}"
    try:
        files = Manifest.read(folder).files
    except ValueError as error:
        return str(error)
    return _first(_size_problem(folder, files), _unknown_file(folder, files)) or _hash_problem(folder, files)


def model_problem_of(folder: Path) -> str | None:
    """Why the model in a checkpoint is not as it was written. What a resumed run needs beside it may be gone."""
    manifest = manifest_of(folder)
    if manifest is None:
        return f"{FILE} is damaged" if has_manifest(folder) else None
    of_model = {name: entry for name, entry in manifest.files.items() if not _is_state(name)}
    return _size_problem(folder, of_model) or _hash_problem(folder, of_model)


def _is_state(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in (*STATE, "training_args.bin"))


def _first(*problems: str | None) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _size_problem(folder: Path, files: Mapping[str, Entry]) -> str | None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.size:
            return f"{name} has {path.stat().st_size} bytes, not the {entry.size} that were written"
    return None


def _unknown_file(folder: Path, files: Mapping[str, Entry]) -> str | None:
    """A file that a resumed run would read, and that was not there when the checkpoint was written."""
    for path in sorted(folder.iterdir()):
        if path.name not in files and any(fnmatch(path.name, pattern) for pattern in READ_BY_NAME):
            return f"{path.name} is not of this checkpoint: {FILE} does not name it"
    return None


def _hash_problem(folder: Path, files: Mapping[str, Entry]) -> str | None:
    with ThreadPoolExecutor(THREADS) as threads:
        digests = threads.map(lambda name: digest(folder / name), files)
        for (name, entry), found in zip(files.items(), digests, strict=True):
            if found != entry.sha256:
                return f"{name} has other content than was written (SHA-256 {found[:8]}, not {entry.sha256[:8]})"
    return None


def _hash_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
