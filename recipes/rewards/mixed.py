"""Rewards for a dataset that mixes mathematics and instructions, each for its own rows.

The column `dataset` says what a row is. `ground_truth` holds a result (GSM8K, MATH), or, for an instruction, the check
and its arguments as JSON: ``{"func_name": "verify_keywords", "keyword_list": ["rain", "road"], ...}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
MATHEMATICS = ("gsm8k", "math")


def mathematics(completions: Sequence[Any], ground_truth: Sequence[str], dataset: Sequence[str]) -> list[float | None]:
    """1 for the right result, 0 for another, None for rows that are no mathematics."""
    return [
        float(result_of(text_of(completion)) == plain(truth)) if kind.lower() in MATHEMATICS else None
        for completion, truth, kind in zip(completions, ground_truth, dataset, strict=True)
    ]


def instructions(completions: Sequence[Any], ground_truth: Sequence[str], dataset: Sequence[str]) -> list[float | None]:
    """1 for an answer that does what was asked, 0 for another, None for other rows and checks that `CHECKS` lacks."""
    return [
        followed(text_of(completion), truth) if kind.lower() not in MATHEMATICS else None
        for completion, truth, kind in zip(completions, ground_truth, dataset, strict=True)
    ]


def text_of(completion: Any) -> str:
    """The text of an answer, which is a list with one message where the prompt is a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def result_of(text: str) -> str:
    r"""What stands in the last `\boxed{...}`, else the last number of the text."""
    start = text.rfind(r"\boxed{")
    if start >= 0:
        return plain(braced(text[start + len(r"\boxed{") :]))
    numbers = NUMBER.findall(text)
    return plain(numbers[-1]) if numbers else ""


def braced(text: str) -> str:
    """The text up to the brace that closes the one before it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[:place]
    return text


def plain(result: str) -> str:
    """A result without what does not change it: blanks, dollars, commas in numbers, a full stop at the end."""
    return re.sub(r"\s|\$|,(?=\d{3})|\\[,;! ]", "", result).rstrip(".").replace(r"\dfrac", r"\frac")


def followed(text: str, truth: str) -> float | None:
    """1 or 0 by the check that a row names, None if `CHECKS` lacks it."""
    arguments = json.loads(truth)
    check = CHECKS.get(arguments["func_name"])
    return None if check is None else float(check(text, arguments))


CHECKS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "validate_lowercase": lambda text, _: text == text.lower(),
    "validate_uppercase": lambda text, _: text == text.upper(),
    "validate_no_commas": lambda text, _: "," not in text,
    "validate_title": lambda text, _: re.search(r"<<[^\n]+>>", text) is not None,
    "validate_quotation": lambda text, _: len(text) > 1 and text[0] == text[-1] == '"',
    "validate_end": lambda text, given: text.strip().endswith(given["end_phrase"]),
    "verify_keywords": lambda text, given: all(word.lower() in text.lower() for word in given["keyword_list"]),
    "validate_forbidden_words": lambda text, given: all(
        word.lower() not in text.lower() for word in given["forbidden_words"]
    ),
    "verify_paragraph_count": lambda text, given: (
        len([part for part in text.split("***") if part.strip()]) == given["N"]
    ),
    "verify_postscript": lambda text, given: given["postscript_marker"] in text,
}
"""The checks by their names in the dataset. It has more; add those that you need."""
