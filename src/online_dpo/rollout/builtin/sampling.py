"""Drawing the next token: the sampling options applied to the logits, and the draw. Pure functions.

Shapes: ``B`` sequences, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from online_dpo.rollout.params import SamplingParams

NEVER = float("-inf")
BLOCK = 128  # tokens in a block of the vocabulary; `draw_tokens` sums blocks first


def reshapes(params: SamplingParams) -> bool:
    """Whether the options change the model's distribution before a token is drawn."""
    return params != replace(params, temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0)


def reshape_logits(logits_BV: torch.Tensor, params: SamplingParams, seen_BV: torch.Tensor | None) -> torch.Tensor:
    """Applies repetition penalty, temperature, top-k, top-p and min-p, in this order, to the logits.

    Each is defined as in `transformers` generation, and applied in the same order. ``seen_BV`` (bool) marks the tokens
    that occur in the prompt or the completion; it is needed only with a repetition penalty.
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
        below_BV = prefix_sum(ascending_BV.softmax(dim=-1)) <= 1.0 - params.top_p
        below_BV[:, -1].fill_(False)  # assigning a Python value would copy it from the host: not capturable
        logits_BV = logits_BV.masked_fill(below_BV.scatter(-1, order_BV, below_BV), NEVER)
    if params.min_p:
        probs_BV = logits_BV.softmax(dim=-1)
        logits_BV = logits_BV.masked_fill(probs_BV < params.min_p * probs_BV.amax(dim=-1, keepdim=True), NEVER)
    return logits_BV


def draw_tokens(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token id for each row by inversion: the first whose cumulative probability exceeds the row's uniform
    number, (B,). Also returns its log-probability under ``logits_BV``, (B,) fp32.

    A row's token depends on its own number only, not on the other rows of the batch. Sums are in float64: in float32
    the tail of a large vocabulary would be lost to rounding. The block that holds the token is found first, so that
    only one block of each row is summed token by token.
    """
    logits_BV = logits_BV.float()
    max_B1 = logits_BV.amax(dim=-1, keepdim=True)
    exp_BV = (logits_BV - max_B1).exp_()
    padding = -exp_BV.shape[-1] % BLOCK
    exp_BNX = (torch.nn.functional.pad(exp_BV, (0, padding)) if padding else exp_BV).unflatten(-1, (-1, BLOCK))
    cdf_BN = prefix_sum(exp_BNX.sum(dim=-1, dtype=torch.float64))
    target_B1 = uniform_B.double()[:, None] * cdf_BN[:, -1:]
    block_B1 = torch.searchsorted(cdf_BN, target_B1, right=True)
    # Logits that are not finite may give an index out of range. Any token will do for them: their loss is not finite
    # either, so the step is skipped.
    block_B1 = block_B1.clamp(max=cdf_BN.shape[-1] - 1)
    exp_BX = exp_BNX.gather(1, block_B1[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    before_B1 = cdf_BN.gather(1, (block_B1 - 1).clamp(min=0)).masked_fill(block_B1 == 0, 0.0)
    inside_B1 = torch.searchsorted(prefix_sum(exp_BX.double()) + before_B1, target_B1, right=True)
    # The sum of a block and the cumulative sum of its tokens may differ in the last bit, so the search may end behind
    # the block's last token of non-zero probability. Then that token is the one.
    index_X = torch.arange(BLOCK, device=exp_BX.device)
    last_B1 = (index_X * (exp_BX > 0)).amax(dim=-1, keepdim=True)
    token_B1 = (block_B1 * BLOCK + torch.minimum(inside_B1, last_B1)).clamp(max=logits_BV.shape[-1] - 1)
    logps_B1 = logits_BV.gather(-1, token_B1) - max_B1 - cdf_BN[:, -1:].log().float()
    return token_B1.squeeze(-1), logps_B1.squeeze(-1)


def next_tokens(
    scores_BV: torch.Tensor,
    raw_logits_BV: torch.Tensor,
    uniform_B: torch.Tensor,
    params: SamplingParams,
    seen_BV: torch.Tensor | None,
    draw: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = draw_tokens,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the next token of each row, (B,), with its log-probability under the model's own distribution, (B,) fp32.

    ``scores_BV`` are the logits after the logits processors of `generate`, ``raw_logits_BV`` those before; without
    processors both are the same tensor. For ``seen_BV`` see `reshape_logits`; ``draw`` is `draw_tokens`, or its
    compiled form. No operation here synchronises with the host or has a shape that depends on values, so it can be
    captured in a CUDA graph.
    """
    plain = scores_BV is raw_logits_BV and not reshapes(params)
    logits_BV = scores_BV if plain else reshape_logits(scores_BV.float(), params, seen_BV)
    token_B, logps_B = draw(logits_BV, uniform_B)
    return token_B, logps_B if plain else token_logprobs(raw_logits_BV, token_B)


def prefix_sum(values: torch.Tensor) -> torch.Tensor:
    """The cumulative sums along the last dimension."""
    return prefix_sum_by_products(values) if may_refuse_cumsum(values.device) else values.cumsum(dim=-1)


def may_refuse_cumsum(device: torch.device) -> bool:
    """Whether torch may raise an error for `cumsum` of floats: it may on a GPU where it is asked for deterministic
    algorithms (``full_determinism``).
    """
    return device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


def prefix_sum_by_products(values: torch.Tensor) -> torch.Tensor:
    """The same by products with a triangle of ones, in float64, which autocast leaves alone. The sums do not decrease
    where no value is negative: each of them adds in the same order, zeros in place of what comes later.
    """
    size = values.shape[-1]
    triangle_XX = torch.ones(BLOCK, BLOCK, dtype=torch.float64, device=values.device).triu()
    padded = torch.nn.functional.pad(values.double(), (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = padded @ triangle_XX
    if size > BLOCK:
        before = prefix_sum_by_products(sums[..., -1])[..., :-1, None]
        sums = torch.cat([sums[..., :1, :], sums[..., 1:, :] + before], dim=-2)
    return sums.flatten(-2)[..., :size].to(values.dtype).contiguous()


def token_logprobs(logits_BV: torch.Tensor, token_B: torch.Tensor) -> torch.Tensor:
    """The log-probability of each row's token under these logits, (B,) fp32."""
    logits_BV = logits_BV.float()
    return logits_BV.gather(-1, token_B[:, None]).squeeze(-1) - logits_BV.logsumexp(dim=-1)
