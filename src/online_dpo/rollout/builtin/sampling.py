"""Picking the next token: reshaping the distribution and drawing from it. Pure functions, one row a sequence.

Shapes: ``B`` sequences, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from online_dpo.rollout.params import SamplingParams

NEVER = float("-inf")
BLOCK = 128  # tokens of the vocabulary that are summed first


def reshapes(params: SamplingParams) -> bool:
    """Whether tokens are drawn from anything but the model's own distribution."""
    return params != replace(params, temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0)


def reshape_logits(logits_BV: torch.Tensor, params: SamplingParams, seen_BV: torch.Tensor | None) -> torch.Tensor:
    """The logits that tokens are drawn from: repetition penalty, temperature, top-k, top-p and min-p, in this order.

    The order, and what each does, is that of `transformers` generation. ``seen_BV`` (bool) marks the tokens that stand
    in the prompt or the completion; it is needed only with a repetition penalty.
    """
    if params.repetition_penalty != 1.0:
        assert seen_BV is not None
        penalised = torch.where(
            logits_BV > 0, logits_BV / params.repetition_penalty, logits_BV * params.repetition_penalty
        )
        logits_BV = torch.where(seen_BV, penalised, logits_BV)
    logits_BV = logits_BV / params.temperature
    if 0 < params.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(params.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, NEVER)
    if params.top_p < 1.0:
        ascending_BV, order_BV = logits_BV.sort(dim=-1)
        below_BV = ascending_BV.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - params.top_p
        below_BV[:, -1].fill_(False)  # an assignment would wait for a GPU
        logits_BV = logits_BV.masked_fill(below_BV.scatter(-1, order_BV, below_BV), NEVER)
    if params.min_p:
        probs_BV = logits_BV.softmax(dim=-1)
        logits_BV = logits_BV.masked_fill(probs_BV < params.min_p * probs_BV.amax(dim=-1, keepdim=True), NEVER)
    return logits_BV


def next_tokens(
    scores_BV: torch.Tensor,
    raw_logits_BV: torch.Tensor,
    uniform_B: torch.Tensor,
    params: SamplingParams,
    seen_BV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row, (B,), and its log-probability under the model's own distribution, (B,) fp32.

    ``scores_BV`` are the logits after any processor, ``raw_logits_BV`` before; without one they are the same tensor.
    ``seen_BV`` as in `reshape_logits`. Nothing here waits for a GPU, or has a shape that depends on values.
    """
    plain = scores_BV is raw_logits_BV and not reshapes(params)
    logits_BV = scores_BV if plain else reshape_logits(scores_BV.float(), params, seen_BV)
    token_B, logps_B = draw_tokens(logits_BV, uniform_B)
    return token_B, logps_B if plain else token_logprobs(raw_logits_BV, token_B)


def draw_tokens(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token id a row, (B,), the first at which the cumulative probability passes the row's uniform number; and its
    log-probability under ``logits_BV``, (B,) fp32.

    Each row uses its own number only, so a row's token does not depend on which other rows are in the batch. Sums are
    in float64: in float32 the tail of a large vocabulary would be lost to rounding. The token's block is found first,
    so that only one block of each row is summed token by token.
    """
    logits_BV = logits_BV.float()
    most_B1 = logits_BV.amax(dim=-1, keepdim=True)
    exp_BV = (logits_BV - most_B1).exp_()
    missing = -exp_BV.shape[-1] % BLOCK
    exp_BNX = (torch.nn.functional.pad(exp_BV, (0, missing)) if missing else exp_BV).unflatten(-1, (-1, BLOCK))
    cdf_BN = exp_BNX.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target_B1 = uniform_B.double()[:, None] * cdf_BN[:, -1:]
    block_B1 = torch.searchsorted(cdf_BN, target_B1, right=True)
    # Of logits that are not finite any token comes out; their loss is not finite either, and the step is skipped.
    block_B1 = block_B1.clamp(max=cdf_BN.shape[-1] - 1)
    exp_BX = exp_BNX.gather(1, block_B1[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    before_B1 = cdf_BN.gather(1, (block_B1 - 1).clamp(min=0)).masked_fill(block_B1 == 0, 0.0)
    inside_B1 = torch.searchsorted(exp_BX.double().cumsum(dim=-1) + before_B1, target_B1, right=True)
    # Two ways to add the same numbers may differ in the last bit: never beyond the last token that is possible.
    place_X = torch.arange(BLOCK, device=exp_BX.device)
    last_B1 = (place_X * (exp_BX > 0)).amax(dim=-1, keepdim=True)
    token_B1 = (block_B1 * BLOCK + torch.minimum(inside_B1, last_B1)).clamp(max=logits_BV.shape[-1] - 1)
    logps_B1 = logits_BV.gather(-1, token_B1) - most_B1 - cdf_BN[:, -1:].log().float()
    return token_B1.squeeze(-1), logps_B1.squeeze(-1)


def token_logprobs(logits_BV: torch.Tensor, token_B: torch.Tensor) -> torch.Tensor:
    """Log-probability of each row's token under unmodified logits, fp32."""
    logits_BV = logits_BV.float()
    return logits_BV.gather(-1, token_B[:, None]).squeeze(-1) - logits_BV.logsumexp(dim=-1)
