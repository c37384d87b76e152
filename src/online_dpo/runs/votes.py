"""Votes of people on two answers to a prompt: kept in the run folder, whole in themselves, so that they outlive the
completions that they are about.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from online_dpo.runs.layout import VOTES
from online_dpo.runs.plain_json import number
from online_dpo.runs.reading import RunFolder
from online_dpo.runs.shared_lines import append_rows

Choice = Literal["first", "second", "tie", "skip"]
CHOICES = get_args(Choice)
Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""


def question_id(prompt: Prompt, one: str, other: str) -> str:
    """What identifies the question which of two answers is better, in whichever order they are shown.

    >>> question_id("Name a colour.", "Red.", "Blue.") == question_id("Name a colour.", "Blue.", "Red.")
    True
    """
    if not isinstance(prompt, str):  # datasets give every message the keys of all messages
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    content = json.dumps([prompt, *sorted((one, other))], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:20]


def is_shown_swapped(seed: int, question: str) -> bool:
    """Whether the answers of a question are shown in the other order: as if thrown, but always the same."""
    return bool(hashlib.sha256(f"{seed}:{question}".encode()).digest()[0] & 1)


@dataclass(frozen=True)
class Vote:
    """What a person has said of two answers, in the order in which they were shown.

    ``group`` names the group of completions they belong to, ``completions`` their places in it; both are empty for a
    question of a trainer that waits. ``seconds`` is how long the person took. ``blind`` says that nothing but the
    prompt and both answers was shown.

    >>> Vote("Name a colour.", "Red.", "Blue.", "first", time=1764160000.0, seconds=3.2, group="12-0-3-0",
    ...     completions=(1, 0))
    """

    prompt: Prompt
    first: str
    second: str
    choice: Choice
    time: float
    seconds: float | None = None
    group: str | None = None
    completions: tuple[int, int] | None = None
    blind: bool = True

    @property
    def question(self) -> str:
        """The id of the question (see `question_id`)."""
        return question_id(self.prompt, self.first, self.second)

    @property
    def preferred(self) -> str | None:
        """The text that the person prefers; ``None`` for a tie or a skipped question."""
        return {"first": self.first, "second": self.second}.get(self.choice)

    def probability(self, text: str) -> float | None:
        """The probability that ``text`` is the better one of both: 1, 0, 0.5 for a tie, ``None`` if skipped."""
        if self.choice == "skip":
            return None
        return 0.5 if self.preferred is None else float(self.preferred == text)

    def as_json(self) -> dict[str, Any]:
        """The vote's line."""
        row: dict[str, Any] = {"time": self.time, "id": self.question, "choice": self.choice}
        row |= {"prompt": self.prompt, "first": self.first, "second": self.second}
        further = {"seconds": self.seconds, "group": self.group, "completions": self.completions}
        row |= {name: value for name, value in further.items() if value is not None}
        return row if self.blind else row | {"blind": False}


def vote_of(row: Mapping[str, Any]) -> Vote | None:
    """The vote of a line; ``None`` if it is none."""
    prompt, texts, choice = row.get("prompt"), (row.get("first"), row.get("second")), row.get("choice")
    if not isinstance(prompt, (str, list)) or not all(isinstance(text, str) for text in texts) or choice not in CHOICES:
        return None
    given, group = row.get("completions"), row.get("group")
    places = [place for place in given if isinstance(place, int)] if isinstance(given, list) else []
    first, second = cast(tuple[str, str], texts)
    return Vote(
        *(prompt, first, second, cast(Choice, choice)),
        time=number(row.get("time")) or 0.0,
        seconds=number(row.get("seconds")),
        group=group if isinstance(group, str) else None,
        completions=(places[0], places[1]) if len(places) == 2 else None,
        blind=row.get("blind") is not False,
    )


def add_vote(folder: Path, vote: Vote) -> None:
    """Append a vote to the votes of a run folder.

    Raises:
        OSError: it cannot be written.
    """
    append_rows(folder / VOTES, [vote.as_json()])


def latest_votes(rows: Iterable[Mapping[str, Any]]) -> dict[str, Vote]:
    """The last vote on each question, by its id: who votes again has changed their mind. A skip takes nothing back."""
    latest: dict[str, Vote] = {}
    for row in rows:
        vote = vote_of(row)
        if vote is not None and (vote.choice != "skip" or vote.question not in latest):
            latest[vote.question] = vote
    return latest


def votes_of(folder: Path) -> dict[str, Vote]:
    """The last vote on each question in a run folder, by the question's id."""
    return latest_votes(RunFolder(folder).votes().rows)


def votes_as_pairs(folder: Path) -> list[dict[str, Any]]:
    """The votes of a run folder as lines for ``online-dpo judge``: prompt, two answers, and which is better. Skipped
    questions are left out.
    """
    return [
        {
            "prompt": vote.prompt,
            "response_a": vote.first,
            "response_b": vote.second,
            "label": {"first": "a", "second": "b", "tie": "tie"}[vote.choice],
            **({} if vote.group is None else {"group": vote.group}),
        }
        for vote in votes_of(folder).values()
        if vote.choice != "skip"
    ]
