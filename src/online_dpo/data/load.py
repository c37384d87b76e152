"""Loads prompts from local files, a folder, a saved dataset or the hub.

`file_rows` reads JSON and CSV files, in the same way for streams and for stored datasets. `datasets` reads everything
else: Parquet files and saved datasets have types of their own. This module finds the files and turns failures into
messages that name them.
"""

from __future__ import annotations

import glob
import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from online_dpo.data.file_rows import CSV_SUFFIXES, check_types, file_rows, suffix_of
from online_dpo.data.json_columns import column_types, json_names, reading_json, stored_features, stored_row
from online_dpo.errors import error_text, named_error

logger = logging.getLogger(__name__)

FORMATS = {
    ".json": "json",
    ".json.gz": "json",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".ndjson": "json",
    ".ndjson.gz": "json",
    **dict.fromkeys(CSV_SUFFIXES, "csv"),
    ".parquet": "parquet",
}
_HEAD_ROWS = 1000
"""Rows of all files together from which the columns of a stream are determined."""

_STORED_VERSION = 1
"""Increase it when rows are stored in another form, so that tables cached by older versions are not reused."""

_READ_ERRORS = (ValueError, OSError, DatasetsError, StopIteration)
"""What `datasets` raises for unreadable data. The errors of pyarrow and pandas are ValueErrors; StopIteration means no
rows."""


def load_prompts(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    types: Mapping[str, str] | None = None,
) -> Dataset | IterableDataset:
    """Load one split of a dataset.

    Args:
        source: a file (.json, .jsonl, .ndjson, .csv, .tsv, also with .gz; .parquet), a glob of such files, a folder of
            them, a folder written by ``save_to_disk``, or else the name of a dataset on the hub. A file, a glob, or a
            saved dataset without splits is used as the requested split, whatever the split's name. The splits of a
            folder follow the names of its files (``train-0.jsonl``, ``test.jsonl``), as in `datasets.load_dataset`.
        split: the split to load. ``train[:10%]`` works for files and hub datasets that are not streamed.
        config: configuration of a hub dataset or a folder.
        streaming: read rows when they are needed, instead of converting the whole dataset first.
        limit: keep only this many rows from the start.
        types: types of columns of CSV files, such as ``{"year": "int64"}``; other columns are text.

    Values of JSON files are those that `json` reads; values of Parquet files have the types of the file.

    Raises:
        ValueError: the source or split does not exist (the message lists what exists), cannot be read (the message
            names file and line of malformed JSON; a stream may raise it only when it reaches the line), or is empty.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"`limit` must be at least 1; it is {limit!r}.")
    for what, text in (("source", source), ("split", split)):
        if not text or text != text.strip() or "\0" in text:
            raise ValueError(f"The {what} is {text!r}. Give it without blanks around it, and not empty.")
    check_types(types or {})
    dataset = _load_split(source, split, config, streaming, types or {})
    if limit is None:
        return dataset
    return dataset.take(limit if isinstance(dataset, IterableDataset) else min(limit, len(dataset)))


def _load_split(
    source: str, split: str, config: str | None, streaming: bool, types: Mapping[str, str]
) -> Dataset | IterableDataset:
    path = Path(source).expanduser()
    is_folder = path.is_dir() and not _is_saved(path)
    are_files = path.is_file() or (not path.is_dir() and _looks_like_files(source))
    if types and not (is_folder or are_files):
        _warn_ignored(source)
    if _is_saved(path):
        return _load_saved(path, split, config, streaming)
    if is_folder:
        return _load_files(source, _files_of_folder(path, config), split, streaming, types)
    if are_files:
        if config is not None:
            raise ValueError(f"`config` ({config!r}) has no meaning for files ({source}). Leave it out.")
        split_name = split.partition("[")[0]
        return _load_files(source, {split_name: _matching_files(path)}, split, streaming, types)
    return _load_hub(source, split, config, streaming)


def _is_saved(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_saved(path: Path, split: str, config: str | None, streaming: bool) -> Dataset | IterableDataset:
    if config is not None:
        raise ValueError(f"`config` ({config!r}) has no meaning for a saved dataset ({path}). Leave it out.")
    try:
        saved = load_from_disk(str(path))
    except IndexError as error:  # what `datasets` makes of a saved dataset without rows
        raise ValueError(f"The dataset saved in {path} is empty.") from error
    except (*_READ_ERRORS, KeyError, TypeError) as error:  # the last two for JSON files without what they should hold
        raise ValueError(f"Cannot read the dataset saved in {path}: {named_error(error)}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"{path} has no split {split!r}. Its splits are: {', '.join(map(str, saved))}.")
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


def _looks_like_files(source: str) -> bool:
    return glob.has_magic(source) or source.startswith(("/", "./", "../", "~")) or suffix_of(Path(source)) in FORMATS


def _matching_files(path: Path) -> list[Path]:
    """The file, or the sorted files that match the glob, after a check that their formats are known."""
    matches = [path] if path.is_file() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = [match for match in matches if match.is_file()]
    if path.exists() and not files:
        raise ValueError(f"{path} is no file but a pipe or a device. Copy its content to a file.")
    if not files:
        raise ValueError(f"No file {path}. {_what_exists(path.parent)}")
    unknown = [str(file) for file in files if suffix_of(file) not in FORMATS]
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
    """The files of each split, assigned by name in the way of `datasets`."""
    known = sorted(file for file in folder.rglob("*") if file.is_file() and suffix_of(file) in FORMATS)
    formats = sorted({FORMATS[suffix_of(file)] for file in known})
    if not known:
        raise ValueError(f"{folder} holds no file ending in {', '.join(FORMATS)}. {_what_exists(folder)}")
    if len(formats) > 1:
        # `datasets` would silently use the most frequent format and ignore the other files.
        raise ValueError(
            f"{folder} mixes {' and '.join(formats)} files; only one format can be read at a time. Give a glob, such "
            f"as {folder / ('*' + suffix_of(known[0]))}."
        )
    if glob.has_magic(str(folder)):
        raise ValueError(f"{folder}: its name has *, ? or [ in it, a pattern to `datasets`. Rename it, or give a file.")
    try:
        data_files: Mapping[Any, Any] = load_dataset_builder(str(folder), config).config.data_files or {}
    except _READ_ERRORS as error:
        raise ValueError(f"Cannot read the folder {folder}: {error}") from error
    splits = {str(split): [Path(file) for file in files] for split, files in data_files.items()}
    _warn_of_unused(folder, known, splits)
    return splits


def _warn_of_unused(folder: Path, known: list[Path], splits: dict[str, list[Path]]) -> None:
    used = {file.resolve() for files in splits.values() for file in files}
    unused = [str(file) for file in known if file.resolve() not in used]
    if unused:
        logger.warning("These files of %s belong to no split and are not read: %s.", folder, ", ".join(unused))


def _load_files(
    source: str, files: dict[str, list[Path]], split: str, streaming: bool, types: Mapping[str, str]
) -> Dataset | IterableDataset:
    """Load one split of local files; ``files`` has the files of each split."""
    every_file = [file for split_files in files.values() for file in split_files]
    formats = sorted({FORMATS[suffix_of(file)] for file in every_file})
    if len(formats) > 1:
        raise ValueError(f"{source} mixes {' and '.join(formats)} files; only one format can be read at a time.")
    if types and formats != ["csv"]:
        _warn_ignored(source)
    if (split if streaming else split.partition("[")[0].partition("+")[0]) not in files:
        listed = "; ".join(f"{name} ({', '.join(map(str, split_files))})" for name, split_files in files.items())
        raise ValueError(f"{source} has no split {split!r}. Its splits are: {listed}.")
    empty = [str(file) for file in every_file if file.stat().st_size == 0]
    if empty:
        raise ValueError(f"There are no prompts in {', '.join(empty)}: the file is empty.")
    if formats != ["parquet"]:
        types = types if formats == ["csv"] else {}
        return _stream_rows(source, files[split], types) if streaming else _map_rows(source, files, split, types)
    return _load_parquet(source, files, split, streaming)


def _load_parquet(source: str, files: dict[str, list[Path]], split: str, streaming: bool) -> Dataset | IterableDataset:
    # Brackets in the name of a folder must not be read as a glob pattern.
    data_files = {name: [glob.escape(str(file.absolute())) for file in group] for name, group in files.items()}
    every_file = [file for split_files in files.values() for file in split_files]
    try:
        _check_parquet(every_file)
        dataset = load_dataset("parquet", data_files=data_files, split=split, streaming=streaming)
        if streaming and next(iter(dataset), None) is None:
            raise ValueError("it holds no rows")
    except _READ_ERRORS as error:
        listed = ", ".join(map(str, every_file))
        raise ValueError(f"Cannot read {source} (files: {listed}): {error_text(_first_cause(error))}") from error
    assert isinstance(dataset, (Dataset, IterableDataset))
    return dataset


def _check_parquet(files: list[Path]) -> None:
    """Check the metadata of Parquet files: they hold rows, and each column has a name of its own."""
    footers = [pq.read_metadata(file) for file in files]
    if not sum(footer.num_rows for footer in footers):
        raise ValueError("it holds no rows")
    for file, footer in zip(files, footers, strict=True):
        names = footer.schema.to_arrow_schema().names
        if double := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{file} has {', '.join(map(repr, double))} more than once; rename the columns")


def _stream_rows(source: str, files: list[Path], types: Mapping[str, str]) -> IterableDataset:
    """A stream of rows in which each file is a shard.

    It is built directly, since a stream of `datasets` cannot be wrapped: in a worker of a data loader, a stream inside
    a stream would be divided among the workers twice and lose rows.
    """
    rows_per_file = max(1, _HEAD_ROWS // len(files))
    head = [row for file in files for row in itertools.islice(file_rows([file], types), rows_per_file)]
    if not head:
        raise ValueError(f"Cannot read {source}: it holds no rows.")
    columns = tuple(_column_types(source, head))
    _check_typed(source, columns, types)
    return IterableDataset.from_generator(
        _complete_rows, gen_kwargs={"files": files, "columns": columns, "types": dict(types)}
    )


def _complete_rows(files: list[Path], columns: tuple[str, ...], types: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Read rows and add missing columns as ``None``."""
    for row in file_rows(files, types):
        yield dict.fromkeys(columns) | row


def _map_rows(source: str, files: dict[str, list[Path]], split: str, types: Mapping[str, str]) -> Dataset:
    """The rows of a split, stored in the cache of `datasets` so that they read back unchanged."""
    try:
        instruction = ReadInstruction.from_spec(split)
        split_names = sorted({part.splitname for part in instruction.to_absolute(dict.fromkeys(files, 0))})
    except ValueError as error:
        raise ValueError(f"Cannot read {source}: {error}") from error
    every_file = [file for name in split_names for file in files[name]]
    version = _version(every_file)
    kinds = _column_types(source, file_rows(every_file, types))
    if not kinds:
        raise ValueError(f"Cannot read {source}: it holds no rows.")
    _check_typed(source, kinds, types)
    kinds |= types
    try:
        stored = {name: _store(files[name], kinds, types) for name in split_names}
    except DatasetsError as error:
        _check_unchanged(source, every_file, version)
        raise ValueError(f"Cannot read {source}: {error_text(_first_cause(error))}") from error
    _check_unchanged(source, every_file, version)
    parts = [
        stored[part.splitname].select(range(min(part.from_, part.to), part.to))
        for part in instruction.to_absolute({name: len(rows) for name, rows in stored.items()})
    ]
    rows = concatenate_datasets(parts)
    if len(rows) == 0:
        raise ValueError(f'Cannot read {source}: split "{split}" corresponds to no data.')
    return reading_json(rows, json_names(kinds))


def _column_types(source: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    try:
        return column_types(rows)
    except ValueError as error:
        names_file = str(error).startswith("Cannot read")
        raise ValueError(str(error) if names_file else f"Cannot read {source}: {error}.") from error


def _version(files: list[Path]) -> tuple[tuple[int, int], ...]:
    """What changes when the files do: their sizes and times."""
    return tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _check_unchanged(source: str, files: list[Path], version: Any) -> None:
    if _version(files) != version:
        raise ValueError(f"{source} has changed while it was read. Start again when nothing writes to it.")


def _check_typed(source: str, columns: Collection[str], types: Mapping[str, str]) -> None:
    """Check that each column with a given type exists."""
    unknown = [name for name in types if name not in columns]
    if unknown:
        raise ValueError(
            f"{source} has no column {', '.join(unknown)}, for which a type is given. Its columns are: "
            f"{', '.join(columns)}."
        )


def _warn_ignored(source: str) -> None:
    logger.warning(
        "%s: the given types of columns are ignored; they are for CSV files, and this data has types of its own.",
        source,
    )


def _store(files: list[Path], kinds: Mapping[str, str], types: Mapping[str, str]) -> Dataset:
    """The cached table of the rows of some files. It is built again if a file has changed."""
    files = [file.absolute() for file in files]
    return Dataset.from_generator(
        _stored_rows,
        features=stored_features(kinds),
        gen_kwargs={
            "files": files,
            "kinds": dict(kinds),
            "types": dict(types),
            "version": (_version(files), _STORED_VERSION),
        },
    )  # pyright: ignore[reportReturnType]


def _stored_rows(
    files: list[Path], kinds: Mapping[str, str], types: Mapping[str, str], version: Any
) -> Iterator[dict[str, Any]]:
    """Read rows and convert them to the form in which they are stored. ``version`` only makes a cache key of its own
    for each version of the files and of this code."""
    for row in file_rows(files, types):
        yield stored_row(row, kinds)


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


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
