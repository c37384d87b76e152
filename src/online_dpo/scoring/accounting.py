"""What a judge counts: how often it was asked, how often it failed, and how far it can be trusted."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence

from online_dpo.errors import FeedbackStopped
from online_dpo.scoring.protocols import Counts

WINDOW, ENOUGH = 200, 20  # questions that the share of failures is taken of, and the fewest that say something

RATES = {"disagreement_rate": ("disagreed", "both_orders"), "position_bias": ("preferred_first", "answered")}


class Tally:
    """Counts since they were last drained. May be used by several threads.

    Args:
        names: of the sums to report, those that are 0 as well.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._counts[name] += amount  # pyright: ignore[reportArgumentType]: a Counter adds any numbers

    def order(self, p_first: float) -> None:
        """An answered question: the probability that it gave to whichever completion stood first."""
        self.add("answered")
        self.add("preferred_first", p_first)

    def drain(self) -> Counts:
        """Sums and rates by the name of their metric, and start anew. A rate that nothing was counted for is absent."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return Counts(
            sums={f"judge/{name}": float(counts[name]) for name in self._names},
            rates={f"judge/{name}": (counts[p], counts[w]) for name, (p, w) in RATES.items() if counts[w]},
        )


class FailureWindow:
    """Stops a judge, or a reward over HTTP, that fails too often.

    Args:
        who: begins the message, such as "Judge `gpt-4.1-mini`".
        max_share: of the last ``WINDOW`` questions, once ``ENOUGH`` were asked.
    """

    def __init__(self, who: str, max_share: float) -> None:
        self._who = who
        self._max_share = max_share
        self._failures: deque[bool] = deque(maxlen=WINDOW)
        self.last_cause = ""

    def add(self, cause: str | None) -> None:
        """One question: why it failed, or ``None``.

        Raises:
            FeedbackStopped: too many did.
        """
        self._failures.append(cause is not None)
        self.last_cause = cause or self.last_cause
        failed, asked = sum(self._failures), len(self._failures)
        if asked >= ENOUGH and failed > self._max_share * asked:
            self._failures.clear()  # whoever goes on all the same begins anew
            raise FeedbackStopped(
                f"{self._who} gave no usable answer to {failed} of the last {asked} questions, more than "
                f"`max_failure_share` ({self._max_share:g}) allows. Last cause: {self.last_cause}"
            )
