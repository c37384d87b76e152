"""Reads rows of local JSON and CSV files without changing their values.

Table readers guess one type for each column: dates become timestamps, 18 next to 2.5 becomes 18.0, ``007`` becomes 7,
``NA`` becomes a missing value, and dicts get each other's keys. Here a value in a JSON file is what Python's `json`
reads, and a value in a CSV file is its text unless a type is given.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from datasets import Value

from online_dpo.config.json_text import parse_json
from online_dpo.data.json_columns import check_names

CSV_SUFFIXES = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
"""File name endings of CSV files, and their separators."""

MAX_LINE = 64 * 2**20
"""Characters of a line, or of a field that goes over several lines. A small compressed file may hold an endless one."""
MAX_ARRAY = 2**30
"""Bytes of a file that is one JSON array, which is read as a whole."""

_ONE_OBJECT = "a file holds one object a line, or one array of objects"
_OTHER_FORMATS = {
    b"PAR1": "a Parquet file; give its name the ending .parquet",
    b"\x1f\x8b": "compressed with gzip; give its name the ending .gz",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it, or use gzip",
    b"\xfd7zXZ\x00": "compressed with xz; decompress it, or use gzip",
    b"BZh": "compressed with bzip2; decompress it, or use gzip",
    b"\xff\xfe": "in UTF-16; save it as UTF-8",
    b"\xfe\xff": "in UTF-16; save it as UTF-8",
    b"\x00": "no text, or not in UTF-8; save it as UTF-8",
}
"""How files begin that are no UTF-8 text, and what they are."""


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
        except UnicodeDecodeError as error:
            raise ValueError(f"Cannot read {file}: the text is not in UTF-8 ({error}). Save it as UTF-8.") from error
        except (OSError, EOFError, zlib.error, csv.Error, Malformed) as error:
            raise ValueError(f"Cannot read {file}: {error}.") from error


def check_types(types: Mapping[str, str]) -> None:
    """Check that the types of columns are names of Arrow types.

    Raises:
        ValueError: a name is unknown.
    """
    for column, name in types.items():
        try:
            Value(name)
            pa.array([], "string").cast(Value(name).pa_type)
        except (ValueError, TypeError, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"Column `{column}` has the type {name!r}, which does not exist ({error}). Common types: int64, "
                "float64, bool, string, date32, timestamp[s]."
            ) from None


def bounded_lines(text: IO[str]) -> Iterator[str]:
    """The lines of an open text.

    Raises:
        Malformed: a line is too long to be one.
    """
    number = 0
    while line := text.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise Malformed(f"line {number} is longer than {MAX_LINE} characters")
        yield line


@contextmanager
def _opened(file: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a file as text, decompressed, after a check that it may be UTF-8."""
    with gzip.open(file) if suffix_of(file).endswith(".gz") else file.open("rb") as content:
        start = content.read(6)
        for mark, what in _OTHER_FORMATS.items():
            if start.startswith(mark) or (mark == b"\x00" and mark in start):
                raise Malformed(f"it is {what}")
        content.seek(0)
        yield io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline)  # pyright: ignore[reportArgumentType]


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    with _opened(file) as text:
        first = " "
        while first.isspace():
            first = text.read(1)
        text.seek(0)
        yield from _array(text.read(MAX_ARRAY + 1)) if first == "[" else _objects(bounded_lines(text))


def _array(content: str) -> list[dict[str, Any]]:
    if len(content) > MAX_ARRAY:
        raise Malformed(f"it is one array of more than {MAX_ARRAY} characters; write one object a line")
    try:
        rows = parse_json(content)
    except json.JSONDecodeError as error:
        raise Malformed(f"malformed JSON in line {error.lineno} ({error.msg}); {_ONE_OBJECT}") from None
    except ValueError as error:
        raise Malformed(str(error)) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise Malformed(f"entry {number} is no JSON object (but of type {type(row).__name__})")
    return rows


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise Malformed(f"line {number} is no JSON object ({error.msg}); {_ONE_OBJECT}") from None
        except ValueError as error:
            raise Malformed(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise Malformed(f"line {number} is no JSON object (but of type {type(row).__name__})")
        yield row


def _csv_rows(file: Path, types: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Read the rows of a CSV file. Empty lines are left out."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # Python's limit is shorter than a long text
    with _opened(file, newline="") as text:
        lines = csv.reader(bounded_lines(text), delimiter=CSV_SUFFIXES[suffix_of(file)], strict=True)
        records = _records(lines)
        header = _checked_header(next(records, []))
        readers = {column: _reader(types[column]) for column in header if column in types}
        for number, values in enumerate(records, start=1):
            if len(values) != len(header):
                raise Malformed(
                    f"line {lines.line_num} has {len(values)} fields, and the header has {len(header)}; a field with a "
                    "separator or a line break in it is written in double quotes"
                )
            row: dict[str, Any] = dict(zip(header, values, strict=True))
            for column, read in readers.items():
                try:
                    row[column] = read(row[column])
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                    raise Malformed(
                        f"row {number} has {row[column]!r} in column `{column}`, which is no {types[column]}"
                    ) from None
            yield row


def _records(lines: Any) -> Iterator[list[str]]:
    """The records of a CSV reader that are no empty lines."""
    try:
        for values in lines:
            if values and not (len(values) == 1 and values[0].isspace()):
                yield values
    except csv.Error as error:
        raise Malformed(f"line {lines.line_num}: {error}") from None


def _checked_header(names: list[str]) -> list[str]:
    duplicates = sorted(name for name, count in Counter(names).items() if count > 1)
    if duplicates:
        raise Malformed(f"its header has {', '.join(map(repr, duplicates[:5]))} more than once; rename the columns")
    try:
        check_names(names)
    except ValueError as problem:
        raise Malformed(str(problem)) from None
    return names


def _reader(type_name: str) -> Callable[[str], Any]:
    """A function from the text of a field to its value; an empty text gives ``None``."""
    dtype = Value(type_name).pa_type

    def read(text: str) -> Any:
        value = None if text == "" else pa.scalar(text).cast(dtype).as_py()
        if isinstance(value, float) and math.isinf(value) and "inf" not in text.lower():
            raise pa.ArrowInvalid("a number beyond the range of the type")
        return value

    return read
