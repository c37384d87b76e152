"""The length-controlled win rate: what the win rate would be if both models' answers were equally long."""

from __future__ import annotations

import numpy as np

RIDGE = np.array([1e-3, 0.1])
"""The ridge penalty on the squares of intercept and slope, relative to the log-likelihood summed over comparisons.

If lengths alone explain the data, the slope would be infinite; its penalty keeps it below about ten, so that the
intercept is well determined. The penalty of the intercept is small: it only keeps it finite if all comparisons are won.
"""
MAX_STEPS = 50
TOLERANCE = 1e-10


def length_controlled_win_rate(preferences_N: np.ndarray, length_differences_N: np.ndarray) -> float | None:
    """The win rate at equal lengths (Dubois et al. 2024, arXiv 2404.04475, equation 2, "AlpacaEval-LC").

    It is a logistic regression of the preference on the difference of the two lengths::

        P(win) = sigmoid(a + b * tanh(difference / std(differences)))

    The result is ``sigmoid(a)``, the prediction at difference 0. Two parts of the paper are left out. The term for the
    difficulty of each instruction is learned from many models on a fixed set of instructions; here there are two models
    and the user's prompts. The regularisation towards answers that were made long or short on purpose is replaced by a
    small ridge penalty.

    If one model's answers are always the longer ones, the result is an extrapolation.

    Args:
        preferences_N: for each comparison, the probability that the first answer is the better one; 0, 0.5 and 1 are
            possible.
        length_differences_N: the length of the first answer minus that of the second, in any unit (characters in the
            paper).

    Returns:
        The win rate; ``None`` without comparisons, or if all differences are equal and not 0, since length and quality
        can then not be told apart.

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
    """The coefficients of the ridge logistic regression, by Newton's method; a step that lowers the objective is
    halved.
    """

    def objective(weights_2: np.ndarray) -> float:
        scores_N = features_N2 @ weights_2
        return float(targets_N @ scores_N - np.logaddexp(0, scores_N).sum() - (RIDGE * weights_2**2).sum() / 2)

    weights_2 = np.zeros(2)
    best = objective(weights_2)
    for _ in range(MAX_STEPS):
        p_N = _sigmoid(features_N2 @ weights_2)
        gradient_2 = features_N2.T @ (targets_N - p_N) - RIDGE * weights_2
        curvature_22 = (features_N2.T * (p_N * (1 - p_N))) @ features_N2 + np.diag(RIDGE)
        step_2 = np.linalg.solve(curvature_22, gradient_2)
        while (value := objective(weights_2 + step_2)) < best and np.abs(step_2).max() > TOLERANCE:
            step_2 = step_2 / 2
        if value < best or np.abs(step_2).max() <= TOLERANCE:
            break
        weights_2, best = weights_2 + step_2, value
    return weights_2


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2
