"""From logits, or from hidden states and a linear head, to log-probabilities of tokens and entropies. Pure.

With ``z`` the logits of a place, ``log p(t) = z[t] - logsumexp(z)``; the gradient with respect to ``z`` is
``onehot(t) - p``, and the entropy is ``logsumexp(z) - sum(p z)``. All of it in fp32, whatever the logits are in.

Shapes: ``M`` predicted tokens, ``X`` those of one chunk, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

SMALLEST = -1e30  # stands for a logit of minus infinity, so that 0 times it is 0


class TokenLogprobs(torch.autograd.Function):
    """``apply(logits_XV, target_X, entropy)`` gives log-probabilities and entropies, (X,) each, in fp32.

    Without ``entropy``, the entropies are zeros. They have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_XV: torch.Tensor, target_X: torch.Tensor, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logps_X, entropy_X, logsumexp_X, _ = _of_logits(logits_XV.to(torch.float32, copy=True), target_X, entropy)
        ctx.save_for_backward(logits_XV, target_X, logsumexp_X)
        ctx.mark_non_differentiable(entropy_X)
        return logps_X, entropy_X

    @staticmethod
    def backward(ctx: Any, grad_X: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_XV, target_X, logsumexp_X = ctx.saved_tensors
        grad_XV = _gradient_of_logits(logits_XV.to(torch.float32, copy=True), target_X, logsumexp_X, grad_X)
        return grad_XV.to(logits_XV.dtype), None, None


class LinearLogprobs(torch.autograd.Function):
    """``apply(hidden_MH, weight_VH, bias_V, target_M, entropy, size)``: the same for a linear head, ``size`` tokens at
    a time.

    Logits exist for one chunk only. A head that is trained computes them again in the backward pass, since its own
    gradient needs each token's. A frozen one needs none there: what a token's log-probability gives to its hidden
    state, ``W[t] - p W``, is kept instead, which is H numbers in place of V.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_M: torch.Tensor,
        entropy: bool,
        size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = _Head(hidden_MH, weight_VH, bias_V, size)
        kept = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        slope_MH = torch.empty_like(head.hidden_MH) if kept else None
        parts = []
        for chunk, logits_XV in head.chunks():
            logps_X, entropy_X, logsumexp_X, exp_XV = _of_logits(logits_XV, target_M[chunk], entropy)
            parts.append((logps_X, entropy_X, logsumexp_X))
            if slope_MH is not None:
                probs_XV = exp_XV.div_(exp_XV.sum(dim=-1, keepdim=True)).to(head.dtype)
                slope_MH[chunk] = head.weight_VH[target_M[chunk]] - probs_XV @ head.weight_VH
        logps_M, entropy_M, logsumexp_M = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.size, ctx.has_bias, ctx.dtypes = size, bias_V is not None, (hidden_MH.dtype, weight_VH.dtype)
        if slope_MH is not None:
            ctx.save_for_backward(slope_MH)
        else:
            ctx.save_for_backward(hidden_MH, weight_VH, bias_V, target_M, logsumexp_M)
        ctx.mark_non_differentiable(entropy_M)
        ctx.compute_dtype = head.dtype
        return logps_M, entropy_M

    @staticmethod
    def backward(ctx: Any, grad_M: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if len(ctx.saved_tensors) == 1:
            [slope_MH] = ctx.saved_tensors
            return (slope_MH * grad_M[:, None]).to(ctx.dtypes[0]), None, None, None, None, None
        hidden_MH, weight_VH, bias_V, target_M, logsumexp_M = ctx.saved_tensors
        head = _Head(hidden_MH, weight_VH, bias_V, ctx.size, ctx.compute_dtype)
        grad_MH = torch.empty_like(head.hidden_MH)
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        grad_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for chunk, logits_XV in head.chunks():
            grad_XV = _gradient_of_logits(logits_XV, target_M[chunk], logsumexp_M[chunk], grad_M[chunk])
            if grad_V is not None:
                grad_V += grad_XV.sum(dim=0)
            grad_XV = grad_XV.to(head.dtype)
            grad_MH[chunk] = grad_XV @ head.weight_VH
            if head.dtype == torch.float32:
                grad_VH.addmm_(grad_XV.t(), head.hidden_MH[chunk])
            else:
                grad_VH += grad_XV.t() @ head.hidden_MH[chunk]
        grad_V = None if bias_V is None or grad_V is None else grad_V.to(bias_V.dtype)
        return grad_MH.to(hidden_MH.dtype), grad_VH.to(weight_VH.dtype), grad_V, None, None, None


class _Head:
    """A linear head in the dtype it computes in, and one buffer for the logits of every chunk."""

    def __init__(
        self,
        hidden_MH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        size: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        device = hidden_MH.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype
        self.dtype = dtype or autocast
        self.hidden_MH, self.weight_VH = hidden_MH.to(self.dtype), weight_VH.to(self.dtype)
        self.bias_V, self.size = bias_V, size

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Each chunk's place among the tokens, and its logits in fp32, which may be overwritten."""
        count, vocabulary = len(self.hidden_MH), len(self.weight_VH)
        buffer_XV = self.hidden_MH.new_empty((min(self.size, count), vocabulary), dtype=torch.float32)
        for start in range(0, count, self.size):
            chunk = slice(start, min(start + self.size, count))
            logits_XV = buffer_XV[: chunk.stop - chunk.start]
            with torch.autocast(self.hidden_MH.device.type, enabled=False):
                if self.dtype == torch.float32:
                    torch.mm(self.hidden_MH[chunk], self.weight_VH.t(), out=logits_XV)
                else:
                    logits_XV.copy_(self.hidden_MH[chunk] @ self.weight_VH.t())
                if self.bias_V is not None:
                    logits_XV += self.bias_V
            yield chunk, logits_XV


def _of_logits(
    logits_XV: torch.Tensor, target_X: torch.Tensor, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, entropies, log-sum-exps (X,), and exp(logits - largest) (X, V). Overwrites the logits."""
    largest_X1 = logits_XV.amax(dim=-1, keepdim=True)
    shifted_XV = logits_XV.sub_(largest_X1)
    picked_X = shifted_XV.gather(-1, target_X[:, None])[:, 0]
    exp_XV = shifted_XV.exp()
    sum_X = exp_XV.sum(dim=-1)
    log_sum_X = sum_X.log()
    entropy_X = torch.zeros_like(log_sum_X)
    if entropy:
        entropy_X = log_sum_X - torch.linalg.vecdot(exp_XV, shifted_XV.clamp_(min=SMALLEST)) / sum_X
    return picked_X - log_sum_X, entropy_X, log_sum_X + largest_X1[:, 0], exp_XV


def _gradient_of_logits(
    logits_XV: torch.Tensor, target_X: torch.Tensor, logsumexp_X: torch.Tensor, grad_X: torch.Tensor
) -> torch.Tensor:
    """``grad * (onehot(target) - p)``. Overwrites the logits."""
    grad_XV = logits_XV.sub_(logsumexp_X[:, None]).exp_().mul_(-grad_X[:, None])
    return grad_XV.scatter_add_(-1, target_X[:, None], grad_X[:, None])
