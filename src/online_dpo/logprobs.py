"""Rows to log-probabilities: what a model gives each completion token, and how uncertain it was.

Shapes: ``R`` rows, ``T`` tokens, ``C`` completion tokens (right-aligned), ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from online_dpo.models import accepts_argument
from online_dpo.types import PackedRows, RowLogprobs


def row_logprobs(model: nn.Module, rows: PackedRows, entropy: bool = True) -> RowLogprobs:
    """Log-probabilities of all completion tokens in one forward pass, at temperature 1.

    Enters through the root module, so wrappers (DDP, autocast, adapters) take part. Only the positions that predict a
    completion token are projected onto the vocabulary; the log-sum-exp is in fp32. Without ``entropy`` that field is
    zeros.
    """
    length = rows.completion_length
    optional: dict[str, Any] = {}
    if accepts_argument(model, "position_ids"):
        optional["position_ids"] = rows.positions_RT
    if accepts_argument(model, "logits_to_keep"):
        optional["logits_to_keep"] = length + 1
    output = model(input_ids=rows.ids_RT, attention_mask=rows.attention_mask_RT, use_cache=False, **optional)
    logits_RCV = output.logits[:, -(length + 1) : -1].float()
    logsumexp_RC = logits_RCV.logsumexp(dim=-1)
    picked_RC = logits_RCV.gather(-1, rows.completion_ids_RC.unsqueeze(-1)).squeeze(-1)
    token_logps_RC = torch.where(rows.completion_mask_RC, picked_RC - logsumexp_RC, 0.0)
    if not entropy:
        return RowLogprobs(token_logps_RC, torch.zeros_like(token_logps_RC))
    return RowLogprobs(token_logps_RC, _entropy(logits_RCV.detach(), rows.completion_mask_RC))


@torch.no_grad()
def _entropy(logits_RCV: torch.Tensor, mask_RC: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each masked position, row by row so that one row's probabilities are in memory at a time."""
    entropy_RC = torch.zeros(mask_RC.shape, device=logits_RCV.device)
    for row, mask_C in enumerate(mask_RC):
        logps_CV = logits_RCV[row, mask_C].log_softmax(dim=-1)
        entropy_RC[row, mask_C] = -(logps_CV.exp() * logps_CV).nan_to_num(nan=0.0).sum(dim=-1)
    return entropy_RC
