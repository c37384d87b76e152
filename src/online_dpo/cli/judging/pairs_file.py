"""Reads the files of answer pairs for ``online-dpo judge``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from online_dpo.config.json_text import bounded_lines, parse_json
from online_dpo.data.text import is_blank

LABELS = {"a": 1.0, "response_a": 1.0, "0": 1.0, "b": 0.0, "response_b": 0.0, "1": 0.0, "tie": None}
"""Labels in a file, and the preference for the first answer that they mean; a tie counts as no label."""


@dataclass(frozen=True)
class LabelledPair:
    """One line of the file: a prompt, two answers, and perhaps a label.

    >>> LabelledPair({"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}, "Hi", "Hello!", "No.", label=1.0,
    ... ordered=False)

    ``label`` is 1 if ``first`` is known to be better, 0 if it is known to be worse, ``None`` if unknown. ``ordered``:
    whether the file defines which answer is shown first; the names "chosen" and "rejected" do not.
    """

    row: dict[str, Any]
    prompt: str | list[dict[str, Any]]
    first: str
    second: str
    label: float | None
    ordered: bool


def read_pairs(path: Path, limit: int | None) -> list[LabelledPair]:
    """Read the pairs of a jsonl file, at most ``limit``.

    Raises:
        ValueError: the file does not exist or is empty, or a line is not a pair; the message names the line.
    """
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder. Give a file in it.")
    if not path.is_file():
        is_pipe = path.exists()
        what = "this is a pipe or a device. Copy its content to a file." if is_pipe else "there is no such file."
        raise ValueError(f"{path}: {what}")
    pairs: list[LabelledPair] = []
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as text:
        for number, line in enumerate(_lines(path, text), start=1):
            if limit is not None and len(pairs) == limit:
                break
            if any("\udc80" <= letter <= "\udcff" for letter in line):
                raise ValueError(f"{path}:{number}: the text is not in UTF-8. Save the file as UTF-8.")
            if line.strip():
                try:
                    pairs.append(_pair(parse_json(line)))
                except json.JSONDecodeError as problem:
                    raise ValueError(f"{path}:{number}: the line is no JSON: {problem}") from None
                except ValueError as problem:
                    raise ValueError(f"{path}:{number}: {problem}") from None
    if not pairs:
        raise ValueError(f"{path}: there are no pairs in it.")
    return pairs


def _lines(path: Path, text: IO[str]) -> Iterator[str]:
    try:
        yield from bounded_lines(text)
    except (ValueError, OSError) as problem:
        raise ValueError(f"{path}: cannot be read: {problem}.") from None


def _pair(row: Any) -> LabelledPair:
    if not isinstance(row, dict):
        raise ValueError("wanted: an object with `prompt`, and two answers.")
    labelled = "chosen" in row or "rejected" in row
    names = ("chosen", "rejected") if labelled else ("response_a", "response_b")
    if missing := [name for name in ("prompt", *names) if name not in row]:
        raise ValueError(f"no {', '.join(f'`{name}`' for name in missing)}.")
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not _is_conversation(prompt):
        raise ValueError("`prompt` must be text or a list of messages.")
    if not _has_text(prompt):
        raise ValueError("`prompt` is empty.")
    first, second = (_answer(name, row[name]) for name in names)
    label = 1.0 if labelled else _label(row.get("label"))
    return LabelledPair(row, prompt, first, second, label, ordered=not labelled)


def _answer(name: str, value: Any) -> str:
    """The answer in a field: a text, or the last message of a conversation."""
    if isinstance(value, str):
        return value
    if _is_conversation(value) and isinstance(value[-1]["content"], str):
        return value[-1]["content"]
    raise ValueError(f"`{name}` must be text or a list of messages.")


def _has_text(prompt: str | list[dict[str, Any]]) -> bool:
    contents = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return any(not isinstance(content, str) or not is_blank(content) for content in contents)


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    )


def _label(value: Any) -> float | None:
    if value is None:
        return None
    name = str(value).lower()
    if isinstance(value, bool) or name not in LABELS:
        raise ValueError(f"`label` is {value!r}; wanted: a or b, 0 or 1 (the place of the better one), tie or null.")
    return LABELS[name]
