"""Columns that a table would change are kept as JSON text in it, and read back where a row is looked at.

A column of one plain type is stored as that. Mixed types, numbers beyond 64 bits, lists and dicts would be converted:
Arrow gives all values of a column, and all dicts at one place, the same type and keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

_SURROGATE = re.compile("[\ud800-\udfff]")
_NOTHING, _JSON, _OTHER = "null", "json", "other"


@dataclass(frozen=True)
class FromJson:
    """A transform of a `datasets.Dataset`: values of the columns ``names`` out of their JSON text.

    >>> FromJson(("label",))({"label": ["18", "2.5", None], "prompt": ["a", "b", "c"]})
    {'label': [18, 2.5, None], 'prompt': ['a', 'b', 'c']}
    """

    names: tuple[str, ...]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        read = {name: [text if text is None else json.loads(text) for text in batch[name]] for name in self._in(batch)}
        return {**batch, **read}

    def _in(self, batch: Mapping[str, Any]) -> list[str]:
        return [name for name in self.names if name in batch]


def column_types(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """How to store each column: as ``string``, ``bool``, ``int64`` or ``float64`` where all values are of that type (or
    ``None``); as ``json`` where they can be that; else ``other``.

    >>> column_types([{"a": 1, "b": 18, "c": None}, {"a": 2, "b": 2.5}])
    {'a': 'int64', 'b': 'json', 'c': 'string'}
    """
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, set()).add(_kind(value))
    return {name: _joined(kinds - {_NOTHING}) for name, kinds in found.items()}


def stored_features(types: Mapping[str, str]) -> Features:
    """The features of a table of such columns, without ``other`` ones."""
    return Features({name: Value("string" if kind == _JSON else kind) for name, kind in types.items()})


def stored_row(row: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """A row as it is stored; columns that it lacks are ``None``."""
    return {name: _stored(row.get(name), kind) for name, kind in types.items()}


def dataset_from_rows(rows: list[dict[str, Any]]) -> Dataset:
    """A dataset whose rows read back as they are given, but that a missing column is ``None``.

    Columns with objects that JSON does not have, such as dates, are left to `datasets`.
    """
    types = column_types(rows)
    columns = {name: [_stored(row.get(name), kind) for row in rows] for name, kind in types.items()}
    return reading_json(Dataset.from_dict(columns, on_mixed_types="use_json"), json_names(types))


def reading_json(dataset: Dataset, names: Iterable[str]) -> Dataset:
    """The dataset, which from now on gives these of its columns out of their JSON text."""
    names = tuple(names)
    return dataset.with_transform(FromJson(names)) if names else dataset.with_format(None)


def json_columns_of(dataset: Dataset | IterableDataset) -> tuple[str, ...]:
    """The columns that are kept as JSON text."""
    if isinstance(dataset, IterableDataset):
        return ()
    transform = dataset.format["format_kwargs"].get("transform")
    return transform.names if isinstance(transform, FromJson) else ()


def json_names(types: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of these types that are kept as JSON text."""
    return tuple(name for name, kind in types.items() if kind == _JSON)


def _joined(kinds: set[str]) -> str:
    if not kinds:
        return "string"
    if _OTHER in kinds:
        return _OTHER
    return kinds.pop() if len(kinds) == 1 else _JSON


def _stored(value: Any, kind: str) -> Any:
    return json.dumps(value) if kind == _JSON and value is not None else value


def _kind(value: Any) -> str:
    """By the type itself: a subclass, such as a number of numpy, would not read back as what it is."""
    if value is None:
        return _NOTHING
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
