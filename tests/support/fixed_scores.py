"""Groups of given texts, and a scorer whose scores are given."""

from __future__ import annotations

from online_dpo.types import Completion, Group, Prompt


def group(prompt: str, *texts: str, reasons: str = "") -> Group:
    """``reasons``: one letter for each completion, "s" or "l"; all stopped when not given."""
    names = [{"s": "stop", "l": "length"}[letter] for letter in reasons or "s" * len(texts)]
    completions = tuple(Completion((9,), (-1.0,), r, 0, t) for t, r in zip(texts, names, strict=True))  # pyright: ignore
    return Group(Prompt(prompt, (1,), row=0), completions)


class Says:
    """A scorer with these scores, whatever the groups; it counts how often it is called."""

    def __init__(self, name: str, *rows: list[float | None]):
        self.name = name
        self.rows = list(rows)
        self.calls = 0

    def score(self, groups):
        self.calls += 1
        return self.rows
