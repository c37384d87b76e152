"""Dataset columns that are stored as JSON text, because an Arrow table would change their values.

A column of one plain type is stored in that type. Mixed types, integers beyond 64 bits, lists and dicts would be
converted: Arrow gives all values of a column the same type, and all its dicts the same keys. They are parsed again when
a row is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

from online_dpo.config.json_text import MAX_DEPTH, depth_of

_SURROGATE = re.compile("[\ud800-\udfff]")
_NULL, _JSON, _OTHER = "null", "json", "other"

MAX_COLUMNS = 1000
"""A table with more takes minutes; what has more has data where names should stand."""


@dataclass(frozen=True)
class FromJson:
    """A transform of a `datasets.Dataset` that parses the JSON text of the columns ``names``.

    >>> FromJson(("label",))({"label": ["18", "2.5", None], "prompt": ["a", "b", "c"]})
    {'label': [18, 2.5, None], 'prompt': ['a', 'b', 'c']}
    """

    names: tuple[str, ...]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Parse the columns of a batch that are stored as JSON text."""
        parsed = {
            name: [text if text is None else json.loads(text) for text in batch[name]]
            for name in self.names
            if name in batch
        }
        return {**batch, **parsed}


def column_types(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Decide how to store each column.

    As ``string``, ``bool``, ``int64`` or ``float64`` if all values have that type (or are ``None``), as ``json`` if all
    can be written as JSON, else ``other``.

    >>> column_types([{"a": 1, "b": 18, "c": None}, {"a": 2, "b": 2.5}])
    {'a': 'int64', 'b': 'json', 'c': 'string'}

    Raises:
        ValueError: there are too many columns, a name holds half of a character, or a value is nested too deeply.
    """
    kinds_of: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in kinds_of:
                kinds_of[name] = set()
                check_names(kinds_of)
            if isinstance(value, (list, dict)) and depth_of(value) > MAX_DEPTH:
                raise ValueError(f"a value of column `{name}` is nested more than {MAX_DEPTH} levels deep")
            kinds_of[name].add(_kind(value))
    return {name: _common_kind(kinds - {_NULL}) for name, kinds in kinds_of.items()}


def check_names(names: Collection[str]) -> None:
    """Check the names of columns.

    Raises:
        ValueError: there are too many of them, or one holds half of a character.
    """
    if len(names) > MAX_COLUMNS:
        raise ValueError(f"there are more than {MAX_COLUMNS} columns; the names of columns look like data")
    for name in names:
        if _SURROGATE.search(name):
            raise ValueError(f"the name of the column {name!r} holds half of a character (a lone surrogate)")


def stored_features(types: Mapping[str, str]) -> Features:
    """The features of a table with columns of these types; there must be no ``other`` column."""
    return Features({name: Value("string" if kind == _JSON else kind) for name, kind in types.items()})


def stored_row(row: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """Convert a row to the form in which it is stored; missing columns become ``None``."""
    return {name: _stored(row.get(name), kind) for name, kind in types.items()}


def dataset_from_rows(rows: list[dict[str, Any]]) -> Dataset:
    """Build a dataset whose rows read back unchanged, except that a missing column is ``None``.

    Columns with values that cannot be written as JSON, such as dates, are converted by `datasets`.
    """
    types = column_types(rows)
    columns = {name: [_stored(row.get(name), kind) for row in rows] for name, kind in types.items()}
    return reading_json(Dataset.from_dict(columns, on_mixed_types="use_json"), json_names(types))


def reading_json(dataset: Dataset, names: Iterable[str]) -> Dataset:
    """Return the dataset with a transform that parses these columns from JSON text."""
    names = tuple(names)
    return dataset.with_transform(FromJson(names)) if names else dataset.with_format(None)


def json_columns_of(dataset: Dataset | IterableDataset) -> tuple[str, ...]:
    """The columns of a dataset that are stored as JSON text."""
    if isinstance(dataset, IterableDataset):
        return ()
    transform = dataset.format["format_kwargs"].get("transform")
    return transform.names if isinstance(transform, FromJson) else ()


def json_names(types: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that are stored as JSON text, given the types of all columns."""
    return tuple(name for name, kind in types.items() if kind == _JSON)


def _common_kind(kinds: set[str]) -> str:
    if not kinds:
        return "string"
    if _OTHER in kinds:
        return _OTHER
    return kinds.pop() if len(kinds) == 1 else _JSON


def _stored(value: Any, kind: str) -> Any:
    return json.dumps(value) if kind == _JSON and value is not None else value


def _kind(value: Any) -> str:
    """How one value could be stored. Subclasses, such as numpy's numbers, do not count as the plain type: they would
    not read back unchanged."""
    if value is None:
        return _NULL
    if type(value) is str:
        return _JSON if _SURROGATE.search(value) else "string"
    if type(value) is bool:
        return "bool"
    if type(value) is int:
        return "int64" if -(2**63) <= value < 2**63 else _JSON
    if type(value) is float:
        return "float64"
    return _JSON if _is_json(value) else _OTHER


def _is_json(value: Any) -> bool:
    if type(value) is list:
        return all(map(_is_json, value))
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(map(_is_json, value.values()))
    return value is None or type(value) in (str, bool, int, float)
