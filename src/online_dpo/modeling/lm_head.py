"""From logits, or from hidden states and a linear head, to log-probabilities of tokens and entropies. Pure.

With ``z`` the logits of a place, ``log p(t) = z[t] - logsumexp(z)``; the gradient with respect to ``z`` is
``onehot(t) - p``, and the entropy is ``logsumexp(z) - sum(p z)``. All of it in fp32, whatever the logits are in.

Shapes: ``M`` predicted tokens, ``X`` those of one chunk, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from online_dpo.modeling.onednn import linear, supports_onednn

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

    Logits exist for one chunk only. What the backward pass needs of them is kept if it is small: of a frozen head, what
    a token's log-probability gives to its hidden state, ``(onehot(t) - p) W``, which is H numbers in place of V; of a
    single chunk its probabilities. Otherwise the logits are computed again.
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
        trained = any(ctx.needs_input_grad[1:3])
        slope_MH = torch.empty_like(head.hidden_MH) if ctx.needs_input_grad[0] and not trained else None
        ones_M = torch.ones(len(target_M), device=target_M.device)
        probs_MV = None
        parts = []
        for chunk, logits_XV in head.chunks():
            logps_X, entropy_X, logsumexp_X, exp_XV = _of_logits(logits_XV, target_M[chunk], entropy)
            parts.append((logps_X, entropy_X, logsumexp_X))
            if slope_MH is not None:
                # The difference is taken here, in fp32: in half precision a probability close to 1 would leave nothing.
                slope_XV = _normalised(exp_XV).neg_().scatter_add_(-1, target_M[chunk, None], ones_M[chunk, None])
                slope_MH[chunk] = slope_XV.to(head.dtype) @ head.weight_VH
            elif trained and len(target_M) <= size:
                probs_MV = _normalised(exp_XV)
        logps_M, entropy_M, logsumexp_M = (torch.cat(part) for part in zip(*parts, strict=True))
        if slope_MH is not None:
            ctx.save_for_backward(slope_MH)
        else:
            ctx.save_for_backward(hidden_MH, weight_VH, bias_V, target_M, logsumexp_M, probs_MV)
        ctx.frozen, ctx.size, ctx.head_dtype, ctx.hidden_dtype = not trained, size, head.dtype, hidden_MH.dtype
        ctx.mark_non_differentiable(entropy_M)
        return logps_M, entropy_M

    @staticmethod
    def backward(ctx: Any, grad_M: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.frozen:
            [slope_MH] = ctx.saved_tensors
            return (slope_MH * grad_M[:, None]).to(ctx.hidden_dtype), None, None, None, None, None
        hidden_MH, weight_VH, bias_V, target_M, logsumexp_M, probs_MV = ctx.saved_tensors
        head = _Head(hidden_MH, weight_VH, bias_V, ctx.size, ctx.head_dtype)
        if probs_MV is not None:
            grad_MV = (probs_MV * -grad_M[:, None]).scatter_add_(-1, target_M[:, None], grad_M[:, None])
            chunks = iter([(slice(None), grad_MV)])
        else:
            chunks = (
                (chunk, _gradient_of_logits(logits_XV, target_M[chunk], logsumexp_M[chunk], grad_M[chunk]))
                for chunk, logits_XV in head.chunks()
            )
        grad_MH, grad_VH, grad_V = head.gradients(chunks)
        to_bias = None if bias_V is None else grad_V.to(bias_V.dtype)
        return grad_MH.to(hidden_MH.dtype), grad_VH.to(weight_VH.dtype), to_bias, None, None, None


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
        by_onednn = supports_onednn(self.weight_VH)
        for start in range(0, count, self.size):
            chunk = slice(start, min(start + self.size, count))
            logits_XV = buffer_XV[: chunk.stop - chunk.start]
            with torch.autocast(self.hidden_MH.device.type, enabled=False):
                if by_onednn:
                    logits_XV.copy_(linear(self.hidden_MH[chunk], self.weight_VH))
                elif self.dtype == torch.float32:
                    torch.mm(self.hidden_MH[chunk], self.weight_VH.t(), out=logits_XV)
                else:
                    logits_XV.copy_(self.hidden_MH[chunk] @ self.weight_VH.t())
                if self.bias_V is not None:
                    logits_XV += self.bias_V
            yield chunk, logits_XV

    def gradients(
        self, chunks: Iterable[tuple[slice, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From the gradients of each chunk's logits to those of hidden states, weight and bias, summed in fp32."""
        grad_MH = torch.empty_like(self.hidden_MH)
        grad_VH = torch.zeros_like(self.weight_VH, dtype=torch.float32)
        grad_V = grad_VH.new_zeros(len(grad_VH))
        for chunk, exact_XV in chunks:
            if self.bias_V is not None:
                grad_V += exact_XV.sum(dim=0)
            grad_XV = exact_XV.to(self.dtype)
            grad_MH[chunk] = grad_XV @ self.weight_VH
            if self.dtype == torch.float32:
                grad_VH.addmm_(grad_XV.t(), self.hidden_MH[chunk])
            else:
                grad_VH += grad_XV.t() @ self.hidden_MH[chunk]
        return grad_MH, grad_VH, grad_V


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


def _normalised(exp_XV: torch.Tensor) -> torch.Tensor:
    return exp_XV.div_(exp_XV.sum(dim=-1, keepdim=True))


def _gradient_of_logits(
    logits_XV: torch.Tensor, target_X: torch.Tensor, logsumexp_X: torch.Tensor, grad_X: torch.Tensor
) -> torch.Tensor:
    """``grad * (onehot(target) - p)``. Overwrites the logits."""
    grad_XV = logits_XV.sub_(logsumexp_X[:, None]).exp_().mul_(-grad_X[:, None])
    return grad_XV.scatter_add_(-1, target_X[:, None], grad_X[:, None])
