"""``judge: human``: the trainer asks people, who vote in the dashboard, and waits for them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from online_dpo.config.feedback import HUMAN
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.collectives import world_size
from online_dpo.distributed.signals import StoppedBySignal, stop_asked
from online_dpo.distributed.waiting import show, waiting_for
from online_dpo.errors import ScoringError
from online_dpo.runs.layout import VOTES
from online_dpo.runs.plain_json import plain_or_named
from online_dpo.runs.questions import Question, ask, asked
from online_dpo.runs.shared_lines import FollowedLines
from online_dpo.runs.votes import Prompt, Vote, latest_votes
from online_dpo.scoring.accounting import JudgeStatistics
from online_dpo.scoring.judges.base import PreferenceJudge
from online_dpo.scoring.protocols import Counts, chat_messages, check_comparisons
from online_dpo.scoring.questions import keep_questions, texts_of
from online_dpo.types import Group
from online_dpo.types import Question as JudgeQuestion

LOOK_SECONDS = 0.25
"""Time between two looks for votes."""
COUNTS = ("questions", "votes", "ties", "unanswered", "seconds")


class HumanJudge(PreferenceJudge):
    """A judge that writes its questions into a run folder and waits for the votes of people.

    >>> HumanJudge("outputs", timeout=600.0)

    They vote in the dashboard (``online-dpo dashboard outputs``), which shows nothing but the prompt and both answers.
    Votes stay in the folder, so that a question that was answered before, such as that of a run that is resumed, is not
    asked again. What nobody has voted on in time, or was skipped, has no answer. A tie is a probability of 0.5.

    Args:
        folder: the run's ``output_dir``.
        timeout: seconds that the questions of one step wait, altogether.
        seed: decides, with the texts, which answer is shown first.

    Raises:
        ValueError: ``timeout`` is not above 0.
        ScoringError: (when judging) the folder cannot be written.
        StoppedBySignal: (when judging) a signal has asked the run to stop; the step is dropped, its votes stay.
    """

    name = HUMAN
    is_fair = True

    def __init__(self, folder: str | Path, timeout: float = 3600.0, seed: int = 0) -> None:
        if not 0 < timeout < math.inf:
            raise ValueError(f"`timeout` must be above 0; it is {timeout}.")
        self.folder, self.timeout, self._seed = Path(folder), timeout, seed
        self._statistics = JudgeStatistics(COUNTS)
        self._ends = _End()

    @classmethod
    def from_config(cls, args: OnlineDPOConfig) -> HumanJudge:
        """Returns the judge of a run.

        Raises:
            ValueError: see `check_patience`.
        """
        check_patience(args)
        return cls(str(args.output_dir), args.human_timeout, args.seed)

    def begin_assessment(self) -> None:
        """Begin the time that the questions of a step wait."""
        self._ends.at = time.monotonic() + self.timeout

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """Return for each group 1 if a person prefers its first completion, 0 for the second, 0.5 for a tie, and
        ``None`` without a vote.
        """
        check_comparisons(comparisons)
        texts = [tuple(_writable(completion.text) for completion in one.completions) for one in comparisons]
        started, now = time.monotonic(), time.time()
        end = started + self.timeout if self._ends.at is None else self._ends.at
        questions = [
            asked(_content(comparison), first, second, self._seed, now, now + end - started)
            for comparison, (first, second) in zip(comparisons, texts, strict=True)
        ]
        wanted = {question.id: question for question in questions if question.first != question.second}
        try:
            votes = self._votes_on(wanted, end)
        finally:
            self._statistics.add("seconds", time.monotonic() - started)
        for comparison, question, (first, _) in zip(comparisons, questions, texts, strict=True):
            if question.id in wanted:
                keep_questions(texts_of(comparison), [_told(question, first, votes.get(question.id), now)])
        return [
            0.5 if first == second else self._counted(votes.get(question.id), first)
            for question, (first, second) in zip(questions, texts, strict=True)
        ]

    def identity(self) -> Mapping[str, Any]:
        """Nothing but its name: neither folder nor patience changes what people prefer."""
        return {}

    def drain(self) -> Counts:
        """Return what was counted since the last call, and reset it."""
        return self._statistics.drain()

    def _counted(self, vote: Vote | None, first: str) -> float | None:
        probability = None if vote is None else vote.probability(first)
        self._statistics.add("unanswered" if probability is None else "votes")
        if vote is not None and probability is not None:
            self._statistics.add("ties", probability == 0.5)
            self._statistics.add_answer(probability if vote.first == first else 1 - probability)
        return probability

    def _votes_on(self, wanted: Mapping[str, Question], end: float) -> dict[str, Vote]:
        """Ask what has no vote yet, and wait for it until ``end``."""
        lines = FollowedLines(self.folder / VOTES)
        rows = lines.further()
        votes = _of(wanted, rows)
        if missing := [question for id, question in wanted.items() if id not in votes]:
            self._ask(missing)
        while (open_ones := len(wanted) - len(votes)) and self._may_wait(end):
            with waiting_for(self._who(open_ones)):  # anew after each vote, so that a notice says what is missing
                while len(votes) == len(wanted) - open_ones and self._may_wait(end):
                    time.sleep(min(LOOK_SECONDS, max(0.0, end - time.monotonic())))
                    if further := lines.further():
                        rows += further
                        votes = _of(wanted, rows)
        return votes

    def _ask(self, questions: Sequence[Question]) -> None:
        try:
            ask(self.folder, questions)
        except OSError as error:
            raise ScoringError(f"The questions to people cannot be written into {self.folder}: {error}") from error
        self._statistics.add("questions", len(questions))
        show(f"Waiting for {self._who(len(questions))}")

    def _who(self, questions: int) -> str:
        plural = "s" if questions > 1 else ""
        return f"a person's vote on {questions} question{plural}: online-dpo dashboard {self.folder}"

    def _may_wait(self, end: float) -> bool:
        """Whether there is time left, and no signal has asked the run to stop.

        Raises:
            StoppedBySignal: one has, and this is the only process. With others, the step ends with the votes that are
                there, since each would stop somewhere else.
        """
        if (number := stop_asked()) is not None:
            if world_size() == 1:
                raise StoppedBySignal(number)
            return False
        return time.monotonic() < end


def check_patience(args: OnlineDPOConfig) -> None:
    """Check that other processes wait longer for one than one waits for people.

    Raises:
        ValueError: they would give up before.
    """
    if args.world_size > 1 and args.human_timeout >= args.ddp_timeout:
        raise ValueError(
            f"`judge: human` waits up to `human_timeout` ({args.human_timeout:g} seconds) for votes, but the other "
            f"processes wait only `ddp_timeout` ({args.ddp_timeout} seconds) for one. Raise `ddp_timeout` above it."
        )


class _End(threading.local):
    """When the time of a step ends. With `max_staleness`, each thread waits for a step of its own."""

    at: float | None = None


def _told(question: Question, first: str, vote: Vote | None, now: float) -> JudgeQuestion:
    """A question for the record of the run; ``now`` is when the step asked."""
    swapped = question.first != first
    probability = None if vote is None else vote.probability(question.first)
    if vote is None or probability is None:
        return JudgeQuestion(swapped, None, failure="nobody voted in time" if vote is None else "it was skipped")
    return JudgeQuestion(swapped, probability, seconds=vote.seconds, cached=vote.time < now)


def _content(comparison: Group) -> Prompt:
    prompt = comparison.prompt
    return _writable(prompt.content) if isinstance(prompt.content, str) else plain_or_named(chat_messages(prompt))


def _writable(text: str) -> str:
    """The text as a file in UTF-8 gives it back: half of a surrogate pair is no text."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _of(wanted: Mapping[str, Question], rows: Sequence[Mapping[str, Any]]) -> dict[str, Vote]:
    return {id: vote for id, vote in latest_votes(rows).items() if id in wanted}
