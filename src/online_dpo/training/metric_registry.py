"""Metrics of one's own: functions of what became of a step, recorded with the step's other metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from online_dpo.config.registry import Registry
from online_dpo.errors import ForeignCodeError
from online_dpo.foreign import foreign
from online_dpo.training.metric_store import MetricStore
from online_dpo.types import Feedback, Pairing

MetricFunction = Callable[[Feedback, Pairing], float | Sequence[float]]
"""From a step's groups with their scores or preferences, and its pairs, to a number or several."""

METRICS: Registry[MetricFunction] = Registry("metric")


def metric(name: str) -> Callable[[MetricFunction], MetricFunction]:
    """Registers a metric, which the logs then hold under that name: the mean over all numbers of all steps since the
    last log, and over all processes.

    >>> @metric("mine/pairs_per_prompt")
    ... def pairs_per_prompt(feedback, pairing): return len(pairing.pairs) / len(feedback.groups)

    Raises:
        RegistryError: the name is taken.
    """
    return METRICS.decorator(name, lambda function: function)


def record_registered(store: MetricStore, feedback: Feedback, pairing: Pairing, step: int) -> None:
    """Ask every registered metric about a step. Numbers that are not finite are left out.

    Raises:
        ForeignCodeError: a metric raised, or returned something else than numbers.
    """
    for name in METRICS:
        with foreign(f"Metric `{name}`", f"(step {step})", raises=ForeignCodeError):
            found = METRICS[name](feedback, pairing)
            numbers = [float(number) for number in (found if isinstance(found, Sequence) else [found])]
        store.mean(name, numbers)
