"""Questions of a trainer that waits for a person's votes (``judge: human``), and which of them still wait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.runs.layout import QUESTIONS
from online_dpo.runs.reading import read_lines
from online_dpo.runs.shared_lines import append_rows
from online_dpo.runs.votes import Prompt, Vote, is_shown_swapped, question_id


@dataclass(frozen=True)
class Question:
    """Which of two answers to a prompt is better. ``first`` and ``second`` stand in the order in which they are shown.

    It was asked at ``time`` and waits until ``until``, both in seconds since 1970.

    >>> Question("Name a colour.", "Red.", "Blue.", time=1764160000.0, until=1764163600.0)
    """

    prompt: Prompt
    first: str
    second: str
    time: float
    until: float

    @property
    def id(self) -> str:
        """What identifies it, whichever answer is shown first."""
        return question_id(self.prompt, self.first, self.second)

    def as_json(self) -> dict[str, Any]:
        """The question's line."""
        row: dict[str, Any] = {"id": self.id, "prompt": self.prompt, "first": self.first, "second": self.second}
        return row | {"time": self.time, "until": self.until}


def asked(prompt: Prompt, one: str, other: str, seed: int, time: float, until: float) -> Question:
    """The question with its answers in the order in which they are shown, which ``seed`` and the texts decide."""
    first, second = sorted((one, other))
    swapped = is_shown_swapped(seed, question_id(prompt, first, second))
    return Question(prompt, *((second, first) if swapped else (first, second)), time, until)


def ask(folder: Path, questions: Sequence[Question]) -> None:
    """Write questions into a run folder, where the dashboard finds them.

    Raises:
        OSError: they cannot be written.
    """
    append_rows(folder / QUESTIONS, [question.as_json() for question in questions])


def question_of(row: Mapping[str, Any]) -> Question | None:
    """The question of a line; ``None`` if it is none."""
    prompt, first, second = row.get("prompt"), row.get("first"), row.get("second")
    time, until = row.get("time"), row.get("until")
    if not isinstance(prompt, (str, list)) or not isinstance(first, str) or not isinstance(second, str):
        return None
    if not isinstance(time, (int, float)) or not isinstance(until, (int, float)):
        return None
    return Question(prompt, first, second, float(time), float(until))


def questions_of(folder: Path) -> dict[str, Question]:
    """All questions of a run folder by their ids, the last asked last; one that was asked again counts from then."""
    found: dict[str, Question] = {}
    for row in read_lines(folder / QUESTIONS).rows:
        if (question := question_of(row)) is not None:
            found.pop(question.id, None)
            found[question.id] = question
    return found


def waiting(questions: Iterable[Question], votes: Mapping[str, Vote], now: float) -> list[Question]:
    """The questions that wait for a vote at ``now``, those first whose time ends first."""
    open_ones = (question for question in questions if question.id not in votes and now < question.until)
    return sorted(open_ones, key=lambda question: (question.until, question.time))
