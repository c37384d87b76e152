"""Reads rows of local JSON and CSV files without changing their values.

Table readers guess one type for each column: dates become timestamps, 18 next to 2.5 becomes 18.0, ``007`` becomes 7,
``NA`` becomes a missing value, and dicts get each other's keys. Here a value in a JSON file is what Python's `json`
reads, and a value in a CSV file is its text unless a type is given.
"""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import Value

CSV_SUFFIXES = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
"""File name endings of CSV files, and their separators."""

_CSV_CHUNK_ROWS = 1000


class Malformed(Exception):
    """A file is malformed; the message says where and how."""


def suffix_of(path: Path) -> str:
    """The ending that tells a file's format, in lower case: ``.jsonl.gz`` for ``a.b.jsonl.gz``, ``.csv`` for
    ``a.b.csv``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def file_rows(files: list[Path], types: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Read the rows of JSON files (one object a line, or one array of objects) and of CSV files.

    Args:
        files: files to read, one after the other.
        types: types of CSV columns that are not text, as Arrow names: ``int64``, ``float64``, ``bool`` ... An empty
            field of such a column is ``None``.

    Raises:
        ValueError: a file is malformed, or a value does not have its type. The message names the file and the line.
    """
    for file in files:
        try:
            yield from _csv_rows(file, types) if suffix_of(file) in CSV_SUFFIXES else _json_rows(file)
        except (OSError, EOFError, UnicodeDecodeError, pd.errors.ParserError, Malformed) as error:
            raise ValueError(f"Cannot read {file}: {error}.") from error


def check_types(types: Mapping[str, str]) -> None:
    """Check that the types of columns are names of Arrow types.

    Raises:
        ValueError: a name is unknown.
    """
    for column, name in types.items():
        try:
            Value(name)
        except ValueError as error:
            raise ValueError(
                f"Column `{column}` has the type {name!r}, which does not exist ({error}). Common types: int64, "
                "float64, bool, string, date32, timestamp[s]."
            ) from None


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file) if suffix_of(file).endswith(".gz") else file.open("rb") as lines:
        start = next((line for line in lines if line.strip()), b"").removeprefix(codecs.BOM_UTF8)
        lines.seek(0)
        yield from _array(lines.read()) if start.lstrip().startswith(b"[") else _objects(lines)


def _array(content: bytes) -> list[dict[str, Any]]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise Malformed(f"malformed JSON in line {error.lineno} ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 ({error})") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise Malformed(f"entry {number} is no JSON object (but of type {type(row).__name__})")
    return rows


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise Malformed(f"line {number} is no JSON object ({error})") from None
        if not isinstance(row, dict):
            raise Malformed(f"line {number} is no JSON object (but of type {type(row).__name__})")
        yield row


def _csv_rows(file: Path, types: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Read the rows of a CSV file, with its header as an ordinary row.

    As a header, pandas would rename equal names and treat additional values as an index.
    """
    # `utf-8-sig` also reads files without a byte order mark. With `utf-8`, pandas would keep the mark as part of a
    # quoted first name.
    chunks = pd.read_csv(
        file,
        sep=CSV_SUFFIXES[suffix_of(file)],
        header=None,
        dtype=str,
        na_filter=False,
        encoding="utf-8-sig",
        chunksize=_CSV_CHUNK_ROWS,
    )
    header: list[str] | None = None
    number = 0
    for chunk in chunks:
        for values in chunk.itertuples(index=False, name=None):
            if header is None:
                header = _checked_header(list(values))
                readers = {column: _reader(types[column]) for column in header if column in types}
                continue
            number += 1
            row = dict(zip(header, values, strict=True))
            for column, read in readers.items():
                try:
                    row[column] = read(row[column])
                except pa.ArrowInvalid:
                    raise Malformed(
                        f"row {number} has {row[column]!r} in column `{column}`, which is no {types[column]}"
                    ) from None
            yield row


def _checked_header(names: list[str]) -> list[str]:
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise Malformed(f"its header has {', '.join(map(repr, duplicates))} more than once; rename the columns")
    return names


def _reader(type_name: str) -> Callable[[str], Any]:
    """A function from the text of a field to its value; an empty text gives ``None``."""
    dtype = Value(type_name).pa_type
    return lambda text: None if text == "" else pa.scalar(text).cast(dtype).as_py()
