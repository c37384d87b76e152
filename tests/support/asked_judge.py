"""Judges for tests of tournaments: they keep what they were asked, and have no answer to some comparisons."""

from __future__ import annotations


class AskedJudge:
    """Keeps the pairs of texts of each call in ``calls``. ``silent`` pairs have no answer; for others, a subclass has
    ``preference(first, second)``.
    """

    def __init__(self, silent=()):
        self.silent = {frozenset(pair) for pair in silent}
        self.calls = []

    def prefer(self, comparisons):
        pairs = [tuple(c.text for c in comparison.completions) for comparison in comparisons]
        self.calls.append(pairs)
        return [self.answer(*pair) for pair in pairs]

    def answer(self, first, second):
        return None if frozenset((first, second)) in self.silent else self.preference(first, second)
