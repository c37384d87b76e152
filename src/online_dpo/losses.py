"""Preference losses: pure functions of log-probabilities, one value a pair, and their registry."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

PairLoss = Callable[[torch.Tensor, float], torch.Tensor]


def sigmoid_loss(log_ratio_N: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO: ``-log sigmoid(beta * h)`` (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""
    return -F.logsigmoid(beta * log_ratio_N)


def ipo_loss(log_ratio_N: torch.Tensor, beta: float) -> torch.Tensor:
    """IPO: ``(h - 1 / (2 * tau))^2`` with tau = beta (Azar et al. 2023, arXiv 2310.12036, equation 17).

    ``h`` is the sum over tokens, as in the paper and in TRL's online trainer.
    """
    return (log_ratio_N - 1 / (2 * beta)) ** 2


LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid_loss, "ipo": ipo_loss}


def log_ratio(
    chosen_logps_N: torch.Tensor,
    rejected_logps_N: torch.Tensor,
    ref_chosen_logps_N: torch.Tensor,
    ref_rejected_logps_N: torch.Tensor,
) -> torch.Tensor:
    """``h``: how much more the policy than the reference prefers the chosen completion, in nats, one value a pair."""
    return (chosen_logps_N - rejected_logps_N) - (ref_chosen_logps_N - ref_rejected_logps_N)
