"""Tolerances: how far two results may differ and still be equal up to rounding error, by dtype.

Two right ways to compute the same number (with and without padding, with shared prompts, in vLLM) add its terms in
another order, so they agree up to rounding only. A wrong way differs by much more. All checks at start-up take their
limits from here.
"""

from __future__ import annotations

import torch

ROUNDING = {torch.float32: 2e-5, torch.float64: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Rounding error of log-probabilities, in nats per token, as the mean over a completion."""

SCORE_ROUNDING = ROUNDING | {torch.float32: 1e-4, torch.float64: 1e-4}
"""Rounding error of a reward model's scores, relative to their mean absolute value."""

MOST_ROUNDING = 4
"""Some models round more coarsely than the values above, but not by more than this factor."""

PADDING_FACTOR = 4
"""A right way may differ from single sequences by this many times what padding alone changes."""

_SYNC_FULL_PRECISION = {torch.float32: 1e-4, torch.float64: 1e-4}


def allowed_difference(padding: float, rounding: float) -> float:
    """The limit for a way of computing that is compared with single sequences.

    Args:
        padding: the difference that padding alone makes, measured with the same model.
        rounding: the rounding error to expect from its dtype.
    """
    return min(max(PADDING_FACTOR * padding, rounding), MOST_ROUNDING * rounding)


def sync_tolerance(dtype: torch.dtype) -> float:
    """The limit, in nats per token, between the log-probabilities of an engine and of the trainer after a weight sync.

    >>> sync_tolerance(torch.float32), sync_tolerance(torch.bfloat16)
    (0.0001, 0.12)
    """
    return _SYNC_FULL_PRECISION.get(dtype, MOST_ROUNDING * ROUNDING[dtype])


def is_full_precision(dtype: torch.dtype) -> bool:
    """Whether the dtype is fp32 or fp64."""
    return dtype in _SYNC_FULL_PRECISION
