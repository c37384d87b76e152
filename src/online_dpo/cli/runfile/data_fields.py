"""Checks of the fields that say how rows are read, as far as that needs no data. Nothing heavy may be imported here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from online_dpo.data.template import template_columns

NAMES = ("dataset_train_split", "dataset_test_split", "dataset_config", "prompt_column", "model_revision")
"""Fields that hold a name, which is never empty."""


def data_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Check the fields; yield for each problem the field and the rest of the message."""
    if (template := values.get("prompt_template")) is not None:
        try:
            template_columns(template)
        except ValueError as problem:
            yield "prompt_template", str(problem).removeprefix("`prompt_template` ")
    for column, kind in (values.get("dataset_types") or {}).items():
        if not isinstance(kind, str):
            yield "dataset_types", f"has {kind!r} for `{column}`; wanted: the name of a type, such as int64."
    for name in NAMES:
        text = values.get(name)
        if text is not None and (not text or text != text.strip()):
            yield name, f"is {text!r}. Give it without blanks around it, and not empty."
