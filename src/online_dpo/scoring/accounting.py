"""Counting for scorers that may fail: the statistics that a judge reports, and the share of failures that stops a run.

`JudgeStatistics` belongs to judges. `FailureWindow` is shared by judges and rewards of all kinds. What is a failure:

- of a reward (function, model, own scorer): a score that is NaN or infinite; `None` is not, the reward does not apply;
- of a judge that is a function or a pairwise model: a preference that is NaN; `None` is not, nor a text too long;
- of a language model as judge: a question without a reply, or a reply without a verdict;
- of a reward over HTTP: a completion without a score because its request failed.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Sequence

from online_dpo.errors import FeedbackStopped
from online_dpo.runs.events import IN_EVENTS
from online_dpo.runs.often import OFTEN
from online_dpo.scoring.protocols import Counts, FailureCountingScorer, PointwiseScorer
from online_dpo.stats.catalogue import Metric, describe

logger = logging.getLogger(__name__)

WINDOW = 200
"""Latest questions over which the share of failures is taken."""

MIN_QUESTIONS = 20
"""Fewest questions after which a share of failures can stop a run."""

LLM, PAIRWISE = "with a language model as judge", "with a pairwise model as judge"
PEOPLE = "with people as judge"
describe(
    "Judges",
    Metric("judge/requests", "requests", "requests sent", "Work for the endpoint.", LLM),
    Metric("judge/cached", "questions", "questions answered by the cache", "Work that was saved.", LLM),
    Metric("judge/failed", "questions", "questions without an answer", "Mend the endpoint: see `max_failure_share`."),
    Metric(
        "judge/unparsable", "answers", "answers without a verdict", "Mend the template, or raise `max_tokens`.", LLM
    ),
    Metric("judge/too_long", "comparisons", "pairs longer than the model reads", "They have no preference.", PAIRWISE),
    Metric("judge/questions", "questions", "questions to people", "How much a step asks of them.", PEOPLE),
    Metric("judge/votes", "votes", "questions that people have answered", "Few of many: give them more time.", PEOPLE),
    Metric("judge/ties", "votes", "votes that prefer neither", "Many: the answers do not differ in quality.", PEOPLE),
    Metric(
        "judge/unanswered",
        "questions",
        "questions that people skipped, or did not answer in time",
        "Their pairs are lost: see `human_timeout`.",
        PEOPLE,
    ),
    Metric("judge/input_tokens", "tokens", "tokens of the requests", "What an endpoint charges for.", LLM),
    Metric("judge/output_tokens", "tokens", "tokens of the answers", "The same.", LLM),
    Metric(
        "judge/cost", "money", "tokens times their prices", "With `max_cost`, the run stops before it is spent.", LLM
    ),
    Metric("judge/seconds", "s", "time that was waited for preferences", "Its part of `time/scoring`."),
    Metric(
        "judge/position_bias",
        "share",
        "mean probability given to the answer that stood first",
        "0.5 is fair. Near 0 or 1 the judge looks at the place: ask in both orders.",
    ),
    Metric(
        "judge/disagreement_rate",
        "share",
        "pairs whose two orders have different winners / pairs asked in both",
        "Noise of the judge. Near 1 it has no opinion.",
        "where a judge is asked in both orders",
    ),
)

RATES = {"disagreement_rate": ("disagreed", "both_orders"), "position_bias": ("preferred_first", "answered")}
"""Metric of each rate, and the names of the two counts whose quotient it is."""


class JudgeStatistics:
    """Counts what a judge did since the counts were last drained. Several threads may use it at the same time.

    Args:
        names: names of the sums to report. Those that are 0 are reported as well.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1) -> None:
        """Add ``amount`` to the count ``name``."""
        with self._lock:
            self._counts[name] += amount  # pyright: ignore[reportArgumentType]: a Counter adds any numbers

    def add_answer(self, p_first: float) -> None:
        """Count an answered question; ``p_first`` is the probability it gave to the completion that was shown first."""
        self.add("answered")
        self.add("preferred_first", p_first)

    def drain(self) -> Counts:
        """Return the sums and rates, named as their metrics, and reset all counts.

        A rate without observations is absent.
        """
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return Counts(
            sums={f"judge/{name}": float(counts[name]) for name in self._names},
            rates={f"judge/{name}": (counts[p], counts[w]) for name, (p, w) in RATES.items() if counts[w]},
        )


class FailureWindow:
    """Stops a run whose judge or reward fails too often. Several threads may use it at the same time.

    Args:
        scorer: subject of the error message, such as "Judge `gpt-4.1-mini`".
        max_share: largest share of failures among the last `WINDOW` questions, applied once there are `MIN_QUESTIONS`.
    """

    def __init__(self, scorer: str, max_share: float) -> None:
        self._scorer = scorer
        self._max_share = max_share
        self._failures: deque[bool] = deque(maxlen=WINDOW)
        self._lock = threading.Lock()
        self.last_cause = ""

    def add(self, cause: str | None) -> None:
        """Count one question: ``cause`` says why it failed, ``None`` that it was answered.

        Raises:
            FeedbackStopped: the share of failures is above the limit.
        """
        with self._lock:
            is_first = cause is not None and not self.last_cause
            self._failures.append(cause is not None)
            self.last_cause = cause or self.last_cause
            failed, asked = sum(self._failures), len(self._failures)
            stops = asked >= MIN_QUESTIONS and failed > self._max_share * asked
            if stops:
                self._failures.clear()  # a caller that catches the error and continues starts with an empty window
        if is_first:
            text = f"{self._scorer} gave no usable answer, which is counted as a failure: {cause}"
            logger.warning("%s", text, extra={IN_EVENTS: True})
        if cause is not None:
            text = f"{self._scorer} gave no usable answer: {cause}"
            OFTEN.tell("failure", self._scorer, text, failed=failed, asked=asked)
        if stops:
            raise FeedbackStopped(
                f"{self._scorer} gave no usable answer to {failed} of the last {asked} questions, more than "
                f"`max_failure_share` ({self._max_share:g}) allows. Last cause: {self.last_cause}"
            )


class ScoreFailures:
    """Counts scores that are NaN or infinite as failures, for each scorer in a `FailureWindow` of its own."""

    def __init__(self) -> None:
        self._windows: dict[int, FailureWindow] = {}

    def add(self, scorer: PointwiseScorer, scores: Sequence[Sequence[float | None]], max_share: float) -> None:
        """Count what a scorer gave. `None` counts neither as a failure nor as an answer.

        Raises:
            FeedbackStopped: the share of failures is above the limit.
        """
        if isinstance(scorer, FailureCountingScorer):
            return
        window = self._windows.setdefault(id(scorer), FailureWindow(f"Reward `{scorer.name}`", max_share))
        for value in (value for row in scores for value in row if value is not None):
            window.add(None if math.isfinite(value) else f"a score of {float(value)}")
