"""Statistics of two models' scored answers to the same prompts: win rates, scores, lengths, KL.

Shapes: ``P`` prompts, ``K`` answers of each model to a prompt. Answer k of one model is compared with answer k of the
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from online_dpo.stats.bootstrap import bootstrap_interval, standard_error
from online_dpo.stats.intervals import wilson_interval
from online_dpo.stats.length_control import length_controlled_win_rate
from online_dpo.stats.preference import preference_by_score
from online_dpo.types import Group

REFITS = 1000
"""Bootstrap resamples of the length-controlled win rate. Fewer than for a mean, since each fits a regression."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class PromptResult:
    """One prompt with the answers of both models and their assessment.

    ``preferences`` has for each answer the probability that the model's answer is better than the other model's,
    ``None`` if undecidable. The scores are ``None`` with a judge; an entry is ``None`` if the score is missing.
    ``log_ratios`` belong to completions sampled at temperature 1: the log-probability under the model minus that under
    the other model, in nats; empty if no KL is estimated.
    """

    model: Group
    against: Group
    preferences: tuple[float | None, ...]
    model_scores: tuple[float | None, ...] | None = None
    against_scores: tuple[float | None, ...] | None = None
    log_ratios: tuple[float, ...] = ()


def preferences_by_score(model: Values, against: Values) -> tuple[float | None, ...]:
    """Turn scores into preferences: 1 if the model's score is higher, 0.5 if equal, 0 if lower, ``None`` if missing.

    >>> preferences_by_score([2.0, 1.0, None], [1.0, 1.0, 1.0])
    (1.0, 0.5, None)
    """
    return tuple(
        None if score is None or other is None else preference_by_score(score, other)
        for score, other in zip(model, against, strict=True)
    )


def compare(results: Sequence[PromptResult], seed: int) -> dict[str, Any]:
    """Compute all reported figures, ready for JSON. A figure without data is ``None``.

    ``win_rate`` is the mean preference: a tie, or an undecided judge, counts half. Its interval is Wilson's if each
    prompt is one comparison that ended in a win, tie or loss, or if all prompts ended the same, which leaves a
    bootstrap without variation; else the percentile bootstrap over prompts. ``kl`` is the mean log-ratio with its
    standard error over prompts.
    """
    preferences_PK = _array([result.preferences for result in results])
    is_decided_PK = ~np.isnan(preferences_PK)
    decided = preferences_PK[is_decided_PK]
    return {
        "prompts": len(results),
        "duels": int(preferences_PK.size),
        "undecidable": int((~is_decided_PK).sum()),
        "wins": int((decided > 0.5).sum()),
        "ties": int((decided == 0.5).sum()),
        "losses": int((decided < 0.5).sum()),
        "win_rate": _win_rate(preferences_PK, seed),
        "length_controlled_win_rate": _length_controlled(results, preferences_PK, seed),
        "score": _scores(results, seed),
        "kl": _kl(results),
        "tokens": _both(results, lambda group: [len(c.token_ids) for c in group.completions]),
        "characters": _both(results, _characters),
        "ended": _both(results, lambda group: [c.finish_reason == "stop" for c in group.completions]),
    }


def _win_rate(preferences_PK: np.ndarray, seed: int) -> dict[str, Any] | None:
    values_P = _row_means(preferences_PK)
    if len(values_P) == 0:
        return None
    value = float(values_P.mean())
    is_clear = preferences_PK.shape[1] == 1 and set(values_P.tolist()) <= {0.0, 0.5, 1.0}
    if is_clear or np.all(values_P == values_P[0]):
        return _interval(value, wilson_interval(value, len(values_P)), "wilson")
    return _interval(value, _mean_interval(values_P, seed), "bootstrap")


def _length_controlled(results: Sequence[PromptResult], preferences_PK: np.ndarray, seed: int) -> dict[str, Any] | None:
    differences_PK = np.array([np.subtract(_characters(m.model), _characters(m.against)) for m in results], dtype=float)

    def of_prompts(indices: np.ndarray) -> float | None:
        is_decided_PK = ~np.isnan(preferences_PK[indices])
        return length_controlled_win_rate(
            preferences_PK[indices][is_decided_PK], differences_PK[indices][is_decided_PK]
        )

    value = of_prompts(np.arange(len(results)))
    if value is None:
        return None
    return _interval(value, bootstrap_interval(len(results), of_prompts, seed, REFITS), "bootstrap")


def _scores(results: Sequence[PromptResult], seed: int) -> dict[str, Any] | None:
    """Mean scores over prompts. The difference is over the answers for which both models have a score."""
    if any(result.model_scores is None for result in results):
        return None
    model_PK, against_PK = (
        _array([getattr(result, name) for result in results]) for name in ("model_scores", "against_scores")
    )
    return {
        "model": _mean(model_PK, seed) | {"missing": int(np.isnan(model_PK).sum())},
        "against": _mean(against_PK, seed) | {"missing": int(np.isnan(against_PK).sum())},
        "difference": _mean(model_PK - against_PK, seed),
    }


def _kl(results: Sequence[PromptResult]) -> dict[str, Any] | None:
    means_P = np.array([np.mean(result.log_ratios) for result in results if result.log_ratios])
    if len(means_P) == 0:
        return None
    return {"value": float(means_P.mean()), "standard_error": standard_error(means_P)}


def _both(results: Sequence[PromptResult], values: Callable[[Group], Sequence[float]]) -> dict[str, float]:
    """The mean of some values over all answers of each model."""
    return {
        side: float(np.mean([value for result in results for value in values(getattr(result, side))]))
        for side in ("model", "against")
    }


def _characters(group: Group) -> list[int]:
    return [len(completion.text) for completion in group.completions]


def _mean(values_PK: np.ndarray, seed: int) -> dict[str, Any]:
    values_P = _row_means(values_PK)
    return _interval(float(values_P.mean()) if len(values_P) else None, _mean_interval(values_P, seed), "bootstrap")


def _mean_interval(values_P: np.ndarray, seed: int) -> tuple[float, float] | None:
    return bootstrap_interval(len(values_P), lambda indices: float(values_P[indices].mean()), seed)


def _interval(value: float | None, bounds: tuple[float, float] | None, method: str) -> dict[str, Any]:
    low, high = bounds or (None, None)
    return {"value": value, "low": low, "high": high, "interval": method}


def _row_means(values_PK: np.ndarray) -> np.ndarray:
    """The mean of each row without its nans; rows with nothing but nan are left out."""
    present_PK = values_PK[~np.isnan(values_PK).all(axis=1)]
    return np.nanmean(present_PK, axis=1) if len(present_PK) else np.empty(0)


def _array(rows: Sequence[Values]) -> np.ndarray:
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=float)
