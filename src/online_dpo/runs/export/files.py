"""Files of a dataset's rows: JSON Lines and Parquet. Both look at all rows first, and are then written in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]
Write = Callable[[Sequence[Row]], None]


class Format(Protocol):
    """A kind of file."""

    def look(self, rows: Sequence[Row]) -> None:
        """Sees rows before anything is written: all of them, in pieces.

        Raises:
            ValueError: the kind of file cannot hold them beside those before.
        """
        ...

    def writing(self, path: Path, columns: Sequence[str]) -> AbstractContextManager[Write]:
        """Opens a file for rows with exactly these columns."""
        ...


class JsonLines:
    """A line of JSON for each row."""

    def look(self, rows: Sequence[Row]) -> None:
        """Nothing has to be known before."""

    @contextmanager
    def writing(self, path: Path, columns: Sequence[str]) -> Iterator[Write]:
        """Opens the file. Half a surrogate pair, which UTF-8 does not have, becomes a question mark."""
        with path.open("w", encoding="utf-8", errors="replace", newline="\n") as file:

            def write(rows: Sequence[Row]) -> None:
                file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)

            yield write


class Parquet:
    """A Parquet file, whose types are those of all rows together."""

    def __init__(self) -> None:
        self._schema: Any = None

    def look(self, rows: Sequence[Row]) -> None:
        """Extends the types by those of these rows."""
        import pyarrow as pa

        try:
            found = pa.Table.from_pylist(list(map(_as_utf8, rows))).schema
            merge = partial(pa.unify_schemas, promote_options="permissive")
            self._schema = found if self._schema is None else merge([self._schema, found])
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"Parquet cannot hold these rows in one file ({error}). Export to a .jsonl file."
            ) from None

    @contextmanager
    def writing(self, path: Path, columns: Sequence[str]) -> Iterator[Write]:
        """Opens the file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([self._schema.field(name) for name in columns])
        with pq.ParquetWriter(path, schema) as writer:
            yield lambda rows: writer.write_table(pa.Table.from_pylist(list(map(_as_utf8, rows)), schema=schema))


FORMATS: dict[str, Callable[[], Format]] = {".jsonl": JsonLines, ".parquet": Parquet}
"""Kinds of files by the endings of their names."""


def _as_utf8(value: Any) -> Any:
    """The value with a question mark for each half of a surrogate pair, as in JSON Lines."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_as_utf8(item) for item in value]
    return {_as_utf8(key): _as_utf8(item) for key, item in value.items()} if isinstance(value, dict) else value
