"""How the metrics of a log are shown to people: their order, which of them, and their format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ORDER = (
    *("step", "epoch", "loss"),
    *("objective/scores", "objective/reference_scores", "objective/trained_scores", "objective/kl"),
    *("win_rate", "gold_score", "gold_win_rate", "gold_"),
    *("rewards/accuracies", "rewards/margins", "rewards/", "objective/scores_margin"),
    *("objective/kl_by_position/", "objective/", "logps/"),
    *("completions/mean_length", "completions/", "val/"),
    *(
        "prompts",
        "pairs/count",
        "pairs/",
        "dropped/",
        "resample/",
        "opponent/",
        "judge/",
        "scores/",
        "agreement/",
        "beta",
    ),
    "",  # metrics of the user's own code
    *("learning_rate", "grad_norm", "train/", "guard/", "sampling/", "perf/", "time/"),
    *("runtime", "samples_per_second", "steps_per_second", "model_preparation_time"),
)
"""Names of metrics and prefixes of names, in the order of a log. Names with the same prefix are sorted."""

SHOWN = {
    "loss": "loss",
    "reward": "objective/scores",
    "kl": "objective/kl",
    "win rate": "win_rate",
    "margin": "rewards/margins",
    "gold": "gold_score",
    "gold win rate": "gold_win_rate",
    "tok/s": "perf/tokens_per_second",
}
"""Headings of the shown figures, and their metrics. Training logs have some of them, evaluations others."""

_RUNTIME = "_runtime"
SUMMARY = "train"
"""Prefix of the metrics in a run's last log, which summarises it."""


def in_order(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Sort the metrics of a log: the main ones first and times last, in the same order on every rank.

    >>> list(in_order({"time/rollout": 1.0, "objective/kl": 0.1, "own": 3, "loss": 0.7}))
    ['loss', 'objective/kl', 'own', 'time/rollout']
    """
    return {name: metrics[name] for name in sorted(metrics, key=_place)}


def _place(name: str) -> tuple[int, str]:
    """The sort key of a metric: the index of the longest prefix in `ORDER`, then the name."""
    prefixes = [prefix for prefix in ORDER if name.startswith(prefix)]
    return ORDER.index(max(prefixes, key=len)), name


def evaluation_prefix(logs: Mapping[str, Any]) -> str:
    """The prefix of an evaluation's metrics: ``eval_``, or ``eval_NAME_`` for one of several datasets; empty for a
    training log.

    >>> evaluation_prefix({"eval_maths_loss": 0.5, "eval_maths_runtime": 1.0})
    'eval_maths_'
    """
    if "learning_rate" in logs:  # the log of a step, in which a reward function may have named a metric so
        return ""
    prefixes = [name.removesuffix(_RUNTIME) for name in logs if name.endswith(_RUNTIME)]
    return f"{prefixes[0]}_" if prefixes and prefixes[0] != SUMMARY else ""


def shown_figures(logs: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """The shown figures of a log by heading, formatted. ``prefix`` is that of `evaluation_prefix`."""
    return {
        heading: number(logs[prefix + metric])
        for heading, metric in SHOWN.items()
        if logs.get(prefix + metric) is not None
    }


def number(value: float) -> str:
    """Format a number with four significant digits, or as a whole number from 1000 on."""
    value = float(value)
    return f"{value:.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Format seconds as ``1:02:03``. Days are counted as hours."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def count(amount: float) -> str:
    """Format a count: ``21,344``, and from a million on ``1.24 billion``.

    >>> [count(amount) for amount in (21_344, 1_235_000_000)]
    ['21,344', '1.24 billion']
    """
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if amount >= size:
            return f"{amount / size:.3g} {name}"
    return f"{amount:,.0f}"
