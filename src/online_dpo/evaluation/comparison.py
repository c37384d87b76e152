"""Two models' answers to the same prompts, scored, and the numbers made of them: win rates, scores, lengths, KL.

Shapes: ``P`` prompts, ``K`` answers of each model to a prompt. Answer k of the one meets answer k of the other.
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
"""Resamples of the length-controlled win rate: each is a regression."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Match:
    """One prompt: what both models answered, and what was said of it.

    ``preferences`` are the probabilities that the model's answer is better than that of the other, ``None`` where
    nothing can be told. The scores are ``None`` with a judge, an entry of theirs where it is missing. ``log_ratios``
    are of completions sampled at temperature 1, log-probability under the model minus that under the other, in nats;
    none where no KL is wanted.
    """

    model: Group
    against: Group
    preferences: tuple[float | None, ...]
    model_scores: tuple[float | None, ...] | None = None
    against_scores: tuple[float | None, ...] | None = None
    log_ratios: tuple[float, ...] = ()


def preferences_by_score(model: Values, against: Values) -> tuple[float | None, ...]:
    """1 for the higher score, one half for equal ones, ``None`` where one is missing.

    >>> preferences_by_score([2.0, 1.0, None], [1.0, 1.0, 1.0])
    (1.0, 0.5, None)
    """
    return tuple(
        None if mine is None or theirs is None else preference_by_score(mine, theirs)
        for mine, theirs in zip(model, against, strict=True)
    )


def compare(matches: Sequence[Match], seed: int) -> dict[str, Any]:
    """Everything that is reported, ready for JSON. What cannot be told is ``None``.

    ``win_rate`` is the mean preference: a tie, or an undecided judge, counts half. Its interval is Wilson's where each
    prompt is one comparison with a clear end, or where all prompts have ended the same, which leaves a bootstrap
    nothing to vary; else the percentile bootstrap over prompts. ``kl`` is the mean log-ratio with its standard error
    over prompts.
    """
    preferences_PK = _array([match.preferences for match in matches])
    told_PK = ~np.isnan(preferences_PK)
    told = preferences_PK[told_PK]
    return {
        "prompts": len(matches),
        "duels": int(preferences_PK.size),
        "undecidable": int((~told_PK).sum()),
        "wins": int((told > 0.5).sum()),
        "ties": int((told == 0.5).sum()),
        "losses": int((told < 0.5).sum()),
        "win_rate": _win_rate(preferences_PK, seed),
        "length_controlled_win_rate": _length_controlled(matches, preferences_PK, seed),
        "score": _scores(matches, seed),
        "kl": _kl(matches),
        "tokens": _both(matches, lambda group: [len(c.token_ids) for c in group.completions]),
        "characters": _both(matches, _characters),
        "ended": _both(matches, lambda group: [c.finish_reason == "stop" for c in group.completions]),
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


def _length_controlled(matches: Sequence[Match], preferences_PK: np.ndarray, seed: int) -> dict[str, Any] | None:
    differences_PK = np.array([np.subtract(_characters(m.model), _characters(m.against)) for m in matches], dtype=float)

    def of_prompts(indices: np.ndarray) -> float | None:
        told_PK = ~np.isnan(preferences_PK[indices])
        return length_controlled_win_rate(preferences_PK[indices][told_PK], differences_PK[indices][told_PK])

    value = of_prompts(np.arange(len(matches)))
    if value is None:
        return None
    return _interval(value, bootstrap_interval(len(matches), of_prompts, seed, REFITS), "bootstrap")


def _scores(matches: Sequence[Match], seed: int) -> dict[str, Any] | None:
    """Means over prompts; the difference is that of prompts in which both have a score."""
    if any(match.model_scores is None for match in matches):
        return None
    mine_PK, theirs_PK = (
        _array([getattr(match, name) for match in matches]) for name in ("model_scores", "against_scores")
    )
    return {
        "model": _mean(mine_PK, seed) | {"missing": int(np.isnan(mine_PK).sum())},
        "against": _mean(theirs_PK, seed) | {"missing": int(np.isnan(theirs_PK).sum())},
        "difference": _mean(mine_PK - theirs_PK, seed),
    }


def _kl(matches: Sequence[Match]) -> dict[str, Any] | None:
    means_P = np.array([np.mean(match.log_ratios) for match in matches if match.log_ratios])
    if len(means_P) == 0:
        return None
    return {"value": float(means_P.mean()), "standard_error": standard_error(means_P)}


def _both(matches: Sequence[Match], values: Callable[[Group], Sequence[float]]) -> dict[str, float]:
    return {
        side: float(np.mean([value for match in matches for value in values(getattr(match, side))]))
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
    """The mean of what each row has; rows without anything are left out."""
    some_PK = values_PK[~np.isnan(values_PK).all(axis=1)]
    return np.nanmean(some_PK, axis=1) if len(some_PK) else np.empty(0)


def _array(rows: Sequence[Values]) -> np.ndarray:
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=float)
