"""A reward for a model that thinks first: what comes after the thought is compared with the row's `solution`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

END = "</think>"


def right_after_thinking(completions: Sequence[Any], solution: Sequence[str]) -> list[float]:
    """1 where the answer holds the right result, else 0. A thought without an end has no answer."""
    return [
        float(result_of(text_of(completion)) == plain(wanted))
        for completion, wanted in zip(completions, solution, strict=True)
    ]


def text_of(completion: Any) -> str:
    """The text of an answer, which is a list with one message where the prompt is a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def result_of(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` after the thought, or None."""
    if END not in text:
        return None
    *_, boxed = text.rpartition(END)[2].rpartition(r"\boxed{")
    depth = 1
    for place, letter in enumerate(boxed):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return plain(boxed[:place])
    return None


def plain(result: str) -> str:
    """A result without what does not change it: blanks, dollars, a full stop at the end."""
    return re.sub(r"\s|\$|\\[,;! ]", "", result).rstrip(".").replace(r"\dfrac", r"\frac")
