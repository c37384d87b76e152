"""Passes over the logits of many tokens, each of which reads them once: the sums of a softmax, and its gradient. Pure.

On a GPU the time of everything in a head but its products is the bytes of its logits: 4 for each in fp32, of which an
H100 moves 3.35e12 a second. Written as single operations, they would be read and written by each (14 times in a head
that is trained). Compiled, they are one kernel each.

Shapes: ``X`` tokens of a chunk, ``V`` vocabulary, ``C`` columns (``V``, or more), ``B`` blocks of columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from online_dpo.modeling.compiling import CompiledFunction
from online_dpo.modeling.lm_head import LOWEST_LOGIT

BLOCK = 1024
"""Columns whose maximum and sums are taken together. So many of one row stay in the registers of a GPU between the
maximum and the sums, so that memory is read once; whole rows of 150 000 do not. Inductor keeps rows of up to 1024."""

Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def softmax_sums(logits_XC: torch.Tensor, bias_C: torch.Tensor | None, target_X: torch.Tensor, entropy: bool) -> Sums:
    """Log-probabilities, entropies, maxima, and logarithms of ``sum(exp(logits - maximum))``, (X,) each, in fp32.

    The last two are kept apart, since their sum is rounded: with logits of 10 000, by a thousandth.

    Args:
        logits_XC: in any type; columns of minus infinity have no part. Multiples of `BLOCK` columns are fastest.
        entropy: whether entropies are wanted; else they are zeros.
    """
    columns = logits_XC.shape[1]
    whole = columns // BLOCK * BLOCK
    parts = []
    if whole:
        bias_BC = None if bias_C is None else bias_C[:whole].unflatten(0, (-1, BLOCK))
        parts.append(_sums_of_blocks(logits_XC[:, :whole].unflatten(1, (-1, BLOCK)), bias_BC))
    if whole < columns:
        bias_BC = None if bias_C is None else bias_C[None, whole:]
        parts.append(_sums_of_blocks(logits_XC[:, None, whole:], bias_BC))
    max_XB, sum_XB, weighted_XB = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    max_X1 = max_XB.amax(dim=1, keepdim=True)
    below_XB = (max_XB - max_X1).clamp(min=LOWEST_LOGIT)
    scale_XB = below_XB.exp()
    sum_X = (scale_XB * sum_XB).sum(dim=1)
    log_sum_X, max_X = sum_X.log(), max_X1[:, 0]
    target_logit_X = logits_XC.gather(1, target_X[:, None])[:, 0].float()
    if bias_C is not None:
        target_logit_X = target_logit_X + bias_C[target_X]
    entropy_X = torch.zeros_like(sum_X)
    if entropy:
        entropy_X = log_sum_X - (scale_XB * (weighted_XB + below_XB * sum_XB)).sum(dim=1) / sum_X
    return target_logit_X - max_X - log_sum_X, entropy_X, max_X, log_sum_X


def logit_gradient(
    logits_XV: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_X: torch.Tensor,
    max_X: torch.Tensor,
    log_sum_X: torch.Tensor,
    grad_X: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of the logits, ``grad * (onehot(target) - p)``, (X, V). Computed in fp32, written in ``dtype``."""
    logits_fp32_XV = logits_XV.float()
    if bias_V is not None:
        logits_fp32_XV = logits_fp32_XV + bias_V
    probs_XV = (logits_fp32_XV - max_X[:, None] - log_sum_X[:, None]).exp()
    is_target_XV = torch.arange(logits_XV.shape[1], device=logits_XV.device) == target_X[:, None]
    return (grad_X[:, None] * (is_target_XV.float() - probs_XV)).to(dtype)


def _sums_of_blocks(
    logits_XBC: torch.Tensor, bias_BC: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each block: its maximum, the sum of ``exp(logits - maximum)``, and that of it times ``logits - maximum``."""
    logits_XBC = logits_XBC.float()
    if bias_BC is not None:
        logits_XBC = logits_XBC + bias_BC
    # A block of nothing but minus infinity has a finite maximum: infinity minus infinity would be no number.
    max_XB1 = logits_XBC.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    below_XBC = (logits_XBC - max_XB1).clamp(min=LOWEST_LOGIT)
    exp_XBC = below_XBC.exp()
    return max_XB1[..., 0], exp_XBC.sum(dim=-1), (exp_XBC * below_XBC).sum(dim=-1)


@dataclass(frozen=True)
class LogitKernels:
    """The two passes over logits, compiled or not."""

    sums: Callable[..., Sums]
    gradient: Callable[..., torch.Tensor]


UNCOMPILED = LogitKernels(softmax_sums, logit_gradient)


@functools.cache
def compiled_kernels() -> LogitKernels:
    """The passes as Inductor compiles them, for all models of the process."""
    return LogitKernels(CompiledFunction(softmax_sums), CompiledFunction(logit_gradient))
