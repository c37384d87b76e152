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

QUANTIZATION = {"nf4": 1.0, "fp4": 1.0, "int8": 0.25}
"""What quantising a model's linear layers may change in its log-probabilities, in nats per token, as the mean over a
few completions. Measured: in 4 bits 0.03 to 0.18 with tiny models, 0.11 to 0.85 with random ones of eight layers, the
most where weights are three times as large as a model is initialised with; in 8 bits 0.003 to 0.12. Another model with
the same distribution of weights differs by three to eight times as much.
"""

QUANTIZATION_FACTOR = 4
"""How many times as much as at the first check, on other prompts, what quantisation changes may be later."""

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


def quantized_tolerance(kind: str | None, rounding: float, first: float | None) -> float:
    """The limit after a weight sync where the trainer's linear layers are quantised and the engine's are not.

    Args:
        kind: how the trainer's are quantised (`QUANTIZATION`); with ``None`` nothing is added to rounding.
        rounding: the limit without quantisation.
        first: the difference at the run's first check, which the later ones are held against.

    >>> [quantized_tolerance("nf4", 0.12, first) for first in (None, 0.01, 0.1, 0.5)]
    [1.0, 0.12, 0.4, 1.0]
    """
    most = QUANTIZATION.get(kind or "", rounding)
    return most if first is None else min(max(QUANTIZATION_FACTOR * first, rounding), max(most, rounding))


def is_full_precision(dtype: torch.dtype) -> bool:
    """Whether the dtype is fp32 or fp64."""
    return dtype in _SYNC_FULL_PRECISION
