"""The win rate that a judge would give if both models' answers were equally long."""

from __future__ import annotations

import numpy as np

RIDGE = np.array([1e-3, 0.1])
"""Penalty on the squares of intercept and slope, as against the log-likelihood summed over comparisons. Data that
lengths alone explain would make the slope infinite; a slope of at most ten or so leaves the intercept well determined.
The intercept itself is hardly touched: it only has to stay finite where all comparisons are won.
"""
MOST_STEPS = 50
CLOSE = 1e-10


def length_controlled_win_rate(preferences_N: np.ndarray, length_differences_N: np.ndarray) -> float | None:
    """The win rate at equal lengths (Dubois et al. 2024, arXiv 2404.04475, equation 2, "AlpacaEval-LC").

    A logistic regression of the preference on the length of the one answer minus that of the other::

        P(win) = sigmoid(a + b * tanh(difference / std(differences)))

    The result is ``sigmoid(a)``, the prediction at difference 0. The paper's third term, the difficulty of each
    instruction, is left out: it is learned from many models on a fixed set of instructions, and here there are two
    models and prompts of one's own. So is its regularisation towards answers that were made long and short on purpose;
    a small ridge takes its place.

    Where one model's answers are always the longer ones, the result is an extrapolation.

    Args:
        preferences_N: the probability, for each comparison, that the first answer is the better one; 0, 0.5 and 1 as
        well. length_differences_N: length of the first answer minus that of the second, in any unit (the paper's is
            characters).

    Returns:
        The win rate; ``None`` without comparisons, or where all differences are the same and not 0, so that nothing
        tells length from quality.

    >>> round(length_controlled_win_rate(np.array([1, 1, 1, 0.0]), np.zeros(4)), 3)
    0.75
    """
    if len(preferences_N) == 0:
        return None
    spread = float(np.std(length_differences_N))
    if spread == 0 and length_differences_N[0] != 0:
        return None
    tanh_N = np.tanh(length_differences_N / spread) if spread else np.zeros(len(preferences_N))
    intercept, _ = _fit(np.stack([np.ones_like(tanh_N), tanh_N], axis=1), preferences_N)
    return float(_sigmoid(intercept))


def _fit(features_N2: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """The coefficients of the ridge logistic regression, by Newton steps that are halved until they are no loss."""

    def objective(weights_2: np.ndarray) -> float:
        scores_N = features_N2 @ weights_2
        return float(targets_N @ scores_N - np.logaddexp(0, scores_N).sum() - (RIDGE * weights_2**2).sum() / 2)

    weights_2 = np.zeros(2)
    best = objective(weights_2)
    for _ in range(MOST_STEPS):
        p_N = _sigmoid(features_N2 @ weights_2)
        gradient_2 = features_N2.T @ (targets_N - p_N) - RIDGE * weights_2
        curvature_22 = (features_N2.T * (p_N * (1 - p_N))) @ features_N2 + np.diag(RIDGE)
        step_2 = np.linalg.solve(curvature_22, gradient_2)
        while (reached := objective(weights_2 + step_2)) < best and np.abs(step_2).max() > CLOSE:
            step_2 = step_2 / 2
        if reached < best or np.abs(step_2).max() <= CLOSE:
            break
        weights_2, best = weights_2 + step_2, reached
    return weights_2


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2
