"""The catalogue of metrics: described beside the code that records them; `docs/reference/metrics.md` is made of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PLACEHOLDER = re.compile(r"[A-Z]{2,}")
"""The parts of a name that stand for any text, such as ``NAME`` in ``scores/NAME``."""


@dataclass(frozen=True)
class Metric:
    """A metric: its name in the logs, its unit, how it is computed, and what one learns from it.

    Parts of the name in capitals stand for any text. ``when`` says in which runs the metric exists; empty: in all.

    >>> Metric("scores/NAME", "score", "mean of what the scorer NAME gave", "Whether the policy gets better by it.")
    """

    name: str
    unit: str
    formula: str
    tells: str
    when: str = ""

    def matches(self, name: str) -> bool:
        """Whether this describes the metric of that name.

        >>> Metric("dropped/REASON", "groups", "", "").matches("dropped/tie")
        True
        """
        pattern = PLACEHOLDER.sub(".+", re.escape(self.name))
        return re.fullmatch(pattern, name) is not None


CATALOGUE: dict[str, list[Metric]] = {}
"""All metrics whose modules have been imported, by the title of their section."""


def describe(section: str, *metrics: Metric) -> None:
    """Add metrics to a section of the catalogue.

    Raises:
        ValueError: a name is described twice.
    """
    known = {metric.name for members in CATALOGUE.values() for metric in members}
    for metric in metrics:
        if metric.name in known:
            raise ValueError(f"The metric `{metric.name}` is described twice.")
        known.add(metric.name)
    CATALOGUE.setdefault(section, []).extend(metrics)


def description(name: str) -> Metric | None:
    """Return the description of a metric, the most particular one if several match; ``None`` if there is none."""
    found = [metric for metric in _all() if metric.matches(name)]
    return max(found, key=lambda metric: len(PLACEHOLDER.sub("", metric.name)), default=None)


def undescribed(names: Iterable[str]) -> list[str]:
    """Return the names that no description matches, sorted."""
    return sorted(name for name in set(names) if description(name) is None)


def _all() -> list[Metric]:
    return [metric for members in CATALOGUE.values() for metric in members]
