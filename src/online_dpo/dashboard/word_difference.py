"""Where two texts differ, word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

_WORDS = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")
"""A word or another character, with the space before it.

Spaces by themselves would match everywhere."""

MOST_WORK = 2_000_000
"""Words of one text times words of the other that are compared one by one: what takes about half a second."""


@dataclass(frozen=True)
class Segment:
    """A piece of a text, and whether the other text has something else in its place.

    >>> Segment("red", changed=True)
    """

    text: str
    changed: bool


def word_difference(one: str, other: str, most_work: int = MOST_WORK) -> tuple[list[Segment], list[Segment]]:
    """Both texts, cut into what they share and what they do not. Joined, the segments are the texts.

    Of texts that are too long to compare word by word, with more than ``most_work``, only the common beginning and end
    count as shared.

    >>> word_difference("a red house", "a blue house")[0]
    [Segment('a', False), Segment(' red', True), Segment(' house', False)]
    """
    first, second = _WORDS.findall(one), _WORDS.findall(other)
    start = _common(first, second)
    end = _common(first[start:][::-1], second[start:][::-1])
    inner = (first[start : len(first) - end], second[start : len(second) - end])
    begun, ended = Segment("".join(first[:start]), False), Segment("".join(first[len(first) - end :]), False)
    sides = _inner(*inner, most_work)
    return _joined([begun, *sides[0], ended]), _joined([begun, *sides[1], ended])


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def _inner(first: Sequence[str], second: Sequence[str], most_work: int) -> tuple[list[Segment], list[Segment]]:
    if len(first) * len(second) > most_work:
        return [Segment("".join(first), True)], [Segment("".join(second), True)]
    sides: tuple[list[Segment], list[Segment]] = ([], [])
    for kind, i, j, k, m in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        sides[0].append(Segment("".join(first[i:j]), kind != "equal"))
        sides[1].append(Segment("".join(second[k:m]), kind != "equal"))
    return sides


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """The same without empty pieces; neighbours of one kind become one."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and joined[-1].changed == segment.changed:
            joined[-1] = Segment(joined[-1].text + segment.text, segment.changed)
        elif segment.text:
            joined.append(segment)
    return joined
