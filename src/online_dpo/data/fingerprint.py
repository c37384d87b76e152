"""Fingerprints of prompts and of tokenizers: the same wherever and however often the data is read."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

ROWS = 1000
"""Rows that are read at a time."""


def data_fingerprint(dataset: Any) -> str:
    """Returns the number of rows of a prepared dataset and a hash of all that is in them; of a stream, only that it is
    one.
    """
    if not isinstance(dataset, Dataset):
        return "a stream"
    digest = hashlib.sha256()
    tables: Any = dataset.with_format("arrow").iter(batch_size=ROWS)
    for table in tables:
        for name in sorted(table.column_names):
            digest.update(name.encode())
            digest.update(_content(table.column(name)))
    return f"{len(dataset)} rows, {digest.hexdigest()[:16]}"


def _content(column: pyarrow.ChunkedArray) -> bytes:
    """The values of a column as bytes; token ids, of which there are many, without a detour over Python."""
    kind = column.type
    if pyarrow.types.is_list(kind) and pyarrow.types.is_integer(kind.value_type) and not column.null_count:
        lengths = pyarrow.compute.list_value_length(column)  # pyright: ignore[reportAttributeAccessIssue]
        values = pyarrow.compute.list_flatten(column)  # pyright: ignore[reportAttributeAccessIssue]
        if not values.null_count:
            return lengths.to_numpy().tobytes() + values.to_numpy().astype("int64").tobytes()
    return json.dumps(column.to_pylist(), default=_text).encode()


def _text(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the size and a hash of the vocabulary, and a hash of the chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    template = tokenizer.chat_template
    return {
        "vocabulary": f"{len(vocabulary)} tokens, {_hash(vocabulary)}",
        "chat_template": None if template is None else _hash(template),
        "eos_token_id": tokenizer.eos_token_id,
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
