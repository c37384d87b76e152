"""Read prompts from local files, a folder, a saved dataset or the hub.

`datasets` does the reading (streams of local JSON excepted); this file finds the files and turns failures into messages
that name them.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetsError

logger = logging.getLogger(__name__)

FORMATS = {
    ".json": "json",
    ".json.gz": "json",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".ndjson": "json",
    ".ndjson.gz": "json",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
}
_HEAD_ROWS = 1000
"""Rows that tell the columns of a JSON stream."""

_READ_ERRORS = (ValueError, OSError, DatasetsError, StopIteration)
"""What `datasets` raises for unreadable data. pyarrow's and pandas' errors are ValueErrors; StopIteration: no rows."""


def load_prompts(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
) -> Dataset | IterableDataset:
    """Load one split of a dataset.

    Args:
        source: a file (.json, .jsonl, .ndjson, .csv, also with .gz; .parquet), a glob of such files, a folder of
            them, a folder written by ``save_to_disk``, or else the name of a dataset on the hub. A file, a glob, and a
            saved dataset without splits are the split that is asked for, whatever its name. The splits of a folder
            follow its files' names (``train-0.jsonl``, ``test.jsonl``), as in `datasets.load_dataset`.
        split: the split to load. ``train[:10%]`` works for files and hub datasets that are not streamed.
        config: configuration of a hub dataset or a folder.
        streaming: read rows when they are needed, instead of converting the whole dataset first.
        limit: keep only this many rows from the start.

    Raises:
        ValueError: the source or split does not exist (what exists is named), cannot be read (a malformed JSON line is
            named by file and line; when streaming, at the latest when it is reached), or is empty.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1; it is {limit}.")
    path = Path(source).expanduser()
    if _is_saved(path):
        dataset = _load_saved(path, split, config, streaming)
    elif path.is_dir():
        dataset = _load_files(source, _files_of_folder(path, config), split, streaming)
    elif path.is_file() or _looks_like_files(source):
        if config is not None:
            raise ValueError(f"`config` ({config!r}) has no meaning for files ({source}). Leave it out.")
        split_name = split.partition("[")[0]
        dataset = _load_files(source, {split_name: _matching_files(path)}, split, streaming)
    else:
        dataset = _load_hub(source, split, config, streaming)
    return dataset if limit is None else dataset.take(limit)


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_saved(path: Path, split: str, config: str | None, streaming: bool) -> Dataset | IterableDataset:
    if config is not None:
        raise ValueError(f"`config` ({config!r}) has no meaning for a saved dataset ({path}). Leave it out.")
    try:
        saved = load_from_disk(str(path))
    except IndexError as error:  # what `datasets` makes of a saved dataset without rows
        raise ValueError(f"The dataset saved in {path} is empty.") from error
    except _READ_ERRORS as error:
        raise ValueError(f"Cannot read the dataset saved in {path}: {error}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"{path} has no split {split!r}. Its splits are: {', '.join(map(str, saved))}.")
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


def _looks_like_files(source: str) -> bool:
    return glob.has_magic(source) or source.startswith(("/", "./", "../", "~")) or _suffix(Path(source)) in FORMATS


def _suffix(path: Path) -> str:
    """``.jsonl.gz`` for ``a.b.jsonl.gz``, ``.csv`` for ``a.b.csv``; in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _matching_files(path: Path) -> list[Path]:
    """The file, or the files that the glob matches, sorted; all of a known format."""
    found = [path] if path.is_file() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = [match for match in found if match.is_file()]
    if not files:
        raise ValueError(f"No file {path}. {_what_exists(path.parent)}")
    unknown = [str(file) for file in files if _suffix(file) not in FORMATS]
    if unknown:
        raise ValueError(f"Cannot tell the format of {', '.join(unknown)}. Known endings: {', '.join(FORMATS)}.")
    return files


def _what_exists(folder: Path) -> str:
    if not folder.is_dir():
        return f"The folder {folder} does not exist either."
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"In {folder} there is: {shown or 'nothing'}."


def _files_of_folder(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """Files of every split, as `datasets` assigns them by their names."""
    known = sorted(file for file in folder.rglob("*") if file.is_file() and _suffix(file) in FORMATS)
    formats = sorted({FORMATS[_suffix(file)] for file in known})
    if not known:
        raise ValueError(f"{folder} holds no file ending in {', '.join(FORMATS)}. {_what_exists(folder)}")
    if len(formats) > 1:
        # `datasets` would take the most frequent format and drop the other files without a word.
        raise ValueError(
            f"{folder} mixes {' and '.join(formats)} files; only one format can be read at a time. Give a glob, such "
            f"as {folder / ('*' + _suffix(known[0]))}."
        )
    try:
        found: Mapping[Any, Any] = load_dataset_builder(str(folder), config).config.data_files or {}
    except _READ_ERRORS as error:
        raise ValueError(f"Cannot read the folder {folder}: {error}") from error
    splits = {str(split): [Path(file) for file in files] for split, files in found.items()}
    used = {file.resolve() for files in splits.values() for file in files}
    unused = [str(file) for file in known if file.resolve() not in used]
    if unused:
        logger.warning("These files of %s belong to no split and are not read: %s.", folder, ", ".join(unused))
    return splits


def _load_files(source: str, files: dict[str, list[Path]], split: str, streaming: bool) -> Dataset | IterableDataset:
    every_file = [file for split_files in files.values() for file in split_files]
    formats = sorted({FORMATS[_suffix(file)] for file in every_file})
    if len(formats) > 1:
        raise ValueError(f"{source} mixes {' and '.join(formats)} files; only one format can be read at a time.")
    read_here = streaming and formats == ["json"]
    if (split if read_here else split.partition("[")[0].partition("+")[0]) not in files:
        listed = "; ".join(f"{name} ({', '.join(map(str, split_files))})" for name, split_files in files.items())
        raise ValueError(f"{source} has no split {split!r}. Its splits are: {listed}.")
    empty = [str(file) for file in every_file if file.stat().st_size == 0]
    if empty:
        raise ValueError(f"There are no prompts in {', '.join(empty)}: the file is empty.")
    if read_here:
        return _stream_json(source, files[split])
    # Brackets in a folder's name are no pattern.
    data_files = {name: [glob.escape(str(file.absolute())) for file in group] for name, group in files.items()}
    try:
        dataset = load_dataset(formats[0], data_files=data_files, split=split, streaming=streaming)
        if streaming and next(iter(dataset), None) is None:
            raise ValueError("it holds no rows")
    except _READ_ERRORS as error:
        raise _unreadable(source, every_file, error) from error
    assert isinstance(dataset, (Dataset, IterableDataset))
    return dataset


def _stream_json(source: str, files: list[Path]) -> IterableDataset:
    """A stream of JSON rows that names file and line of a malformed one; each file is a shard.

    `datasets` names neither once it is past a file's beginning, and its own stream cannot be wrapped: inside a worker
    of a data loader, a stream within a stream would be divided among the workers twice and lose rows.
    """
    head = list(itertools.islice(_json_rows(files, ()), _HEAD_ROWS))
    if not head:
        raise ValueError(f"Cannot read {source}: it holds no rows.")
    columns = tuple(dict.fromkeys(column for row in head for column in row))
    return IterableDataset.from_generator(_json_rows, gen_kwargs={"files": files, "columns": columns})


def _json_rows(files: list[Path], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of JSON files: one object a line, or one array. Columns that a row lacks are ``None``.

    Raises:
        ValueError: a file is malformed. Names the file and the line.
    """
    for file in files:
        try:
            with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as lines:
                start = next((line for line in lines if line.strip()), b"").removeprefix(codecs.BOM_UTF8)
                lines.seek(0)
                rows = _array(lines.read()) if start.lstrip().startswith(b"[") else _objects(lines)
                for row in rows:
                    yield dict.fromkeys(columns) | row
        except (OSError, EOFError, _Malformed) as error:
            raise ValueError(f"Cannot read {file}: {error}.") from error


class _Malformed(Exception):
    """Where and how a JSON file is malformed."""


def _array(content: bytes) -> list[dict[str, Any]]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise _Malformed(f"malformed JSON in line {error.lineno} ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise _Malformed(f"not UTF-8 ({error})") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise _Malformed(f"entry {number} is no JSON object (but of type {type(row).__name__})")
    return rows


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _Malformed(f"line {number} is no JSON object ({error})") from None
        if not isinstance(row, dict):
            raise _Malformed(f"line {number} is no JSON object (but of type {type(row).__name__})")
        yield row


def _load_hub(source: str, split: str, config: str | None, streaming: bool) -> Dataset | IterableDataset:
    try:
        dataset = load_dataset(source, config, split=split, streaming=streaming)
    except _READ_ERRORS as error:
        raise ValueError(
            f"Cannot load {source!r}, which is no file or folder here, from the hub "
            f"(split {split!r}, config {config!r}): {error}"
        ) from error
    assert isinstance(dataset, (Dataset, IterableDataset))
    return dataset


def _unreadable(source: str, files: list[Path], error: BaseException) -> ValueError:
    """What to tell the user when `datasets` could not read the files: the malformed line, else the first cause."""
    for file in files:
        if FORMATS[_suffix(file)] == "json":
            try:
                rows = sum(1 for _ in _json_rows([file], ()))
            except ValueError as malformed:
                return malformed
            if rows == 0:
                return ValueError(f"Cannot read {file}: it holds no rows.")
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return ValueError(f"Cannot read {source} (files: {', '.join(map(str, files))}): {cause or type(cause).__name__}")
