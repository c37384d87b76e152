"""Log-probabilities of tokens and entropies, computed from logits or from hidden states and a linear head. Pure.

With the logits ``z`` of one position, ``log p(t) = z[t] - logsumexp(z)``; its gradient with respect to ``z`` is
``onehot(t) - p``, and the entropy is ``logsumexp(z) - sum(p z)``. All of it is computed in fp32, whatever the dtype of
the logits.

Shapes: ``M`` predicted tokens, ``X`` those of one chunk, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from online_dpo.modeling.onednn import linear, supports_onednn

LOWEST_LOGIT = -1e30  # replaces logits of minus infinity in the entropy: 0 times this is 0, 0 times infinity is nan


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities of target tokens and entropies from logits.

    ``apply(logits_XV, target_X, entropy)`` returns both, (X,) each, in fp32. Entropies have no gradient; without
    ``entropy`` they are zeros. Only the log-sum-exp is kept for the backward pass, and no probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_XV: torch.Tensor, target_X: torch.Tensor, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log-probabilities and entropies."""
        logits_fp32_XV = logits_XV.to(torch.float32, copy=True)  # a copy, because it is overwritten
        logps_X, entropy_X, logsumexp_X, _ = _logprobs_of_logits(logits_fp32_XV, target_X, entropy)
        ctx.save_for_backward(logits_XV, target_X, logsumexp_X)
        ctx.mark_non_differentiable(entropy_X)
        return logps_X, entropy_X

    @staticmethod
    def backward(ctx: Any, grad_X: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the gradient with respect to the logits, in their dtype."""
        logits_XV, target_X, logsumexp_X = ctx.saved_tensors
        grad_XV = _gradient_of_logits(logits_XV.to(torch.float32, copy=True), target_X, logsumexp_X, grad_X)
        return grad_XV.to(logits_XV.dtype), None, None


class LinearLogprobs(torch.autograd.Function):
    """Log-probabilities of target tokens and entropies from hidden states and a linear head, in chunks.

    ``apply(hidden_MH, weight_VH, bias_V, target_M, entropy, size)`` returns both, (M,) each, in fp32. The logits of
    only one chunk of ``size`` tokens exist at a time. For the backward pass is kept what is small: with a frozen head
    the gradient of each log-probability with respect to its hidden state, ``(onehot(t) - p) W``, which is H numbers
    instead of V; with a trained head and a single chunk its probabilities. Otherwise the logits are computed again.
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
        """Returns log-probabilities and entropies."""
        head = _Head(hidden_MH, weight_VH, bias_V, size)
        trained = any(ctx.needs_input_grad[1:3])
        dlogp_MH = torch.empty_like(head.hidden_MH) if ctx.needs_input_grad[0] and not trained else None
        ones_M = torch.ones(len(target_M), device=target_M.device)
        probs_MV = None
        parts = []
        for chunk, logits_XV in head.chunks():
            logps_X, entropy_X, logsumexp_X, exp_XV = _logprobs_of_logits(logits_XV, target_M[chunk], entropy)
            parts.append((logps_X, entropy_X, logsumexp_X))
            if dlogp_MH is not None:
                # onehot - p in fp32: in half precision, a probability close to 1 would give a difference of 0.
                dlogp_XV = _normalise(exp_XV).neg_().scatter_add_(-1, target_M[chunk, None], ones_M[chunk, None])
                dlogp_MH[chunk] = dlogp_XV.to(head.dtype) @ head.weight_VH
            elif trained and len(target_M) <= size:
                probs_MV = _normalise(exp_XV)
        logps_M, entropy_M, logsumexp_M = (torch.cat(part) for part in zip(*parts, strict=True))
        if dlogp_MH is not None:
            ctx.save_for_backward(dlogp_MH)
        else:
            ctx.save_for_backward(hidden_MH, weight_VH, bias_V, target_M, logsumexp_M, probs_MV)
        ctx.frozen, ctx.size, ctx.head_dtype, ctx.hidden_dtype = not trained, size, head.dtype, hidden_MH.dtype
        ctx.mark_non_differentiable(entropy_M)
        return logps_M, entropy_M

    @staticmethod
    def backward(ctx: Any, grad_M: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the gradients with respect to hidden states, weight and bias, in their dtypes."""
        if ctx.frozen:
            [dlogp_MH] = ctx.saved_tensors
            return (dlogp_MH * grad_M[:, None]).to(ctx.hidden_dtype), None, None, None, None, None
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
    """A linear head in the dtype of its products, which computes logits and gradients chunk by chunk."""

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
        """Yields each chunk's slice of the tokens and its logits in fp32.

        All chunks use one buffer. The caller may overwrite it, and must be done with it before the next chunk.
        """
        count, vocabulary = len(self.hidden_MH), len(self.weight_VH)
        buffer_XV = self.hidden_MH.new_empty((min(self.size, count), vocabulary), dtype=torch.float32)
        use_onednn = supports_onednn(self.weight_VH)
        for start in range(0, max(count, 1), self.size):  # no token at all: one chunk of none
            chunk = slice(start, min(start + self.size, count))
            logits_XV = buffer_XV[: chunk.stop - chunk.start]
            with torch.autocast(self.hidden_MH.device.type, enabled=False):  # the inputs have the wanted dtype already
                if use_onednn:
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
        """The gradients of hidden states, weight and bias, from those of each chunk's logits; sums are in fp32."""
        grad_MH = torch.empty_like(self.hidden_MH)
        grad_VH = torch.zeros_like(self.weight_VH, dtype=torch.float32)
        grad_V = grad_VH.new_zeros(len(grad_VH))
        for chunk, grad_fp32_XV in chunks:
            if self.bias_V is not None:
                grad_V += grad_fp32_XV.sum(dim=0)
            grad_XV = grad_fp32_XV.to(self.dtype)
            grad_MH[chunk] = grad_XV @ self.weight_VH
            if self.dtype == torch.float32:
                grad_VH.addmm_(grad_XV.t(), self.hidden_MH[chunk])
            else:
                grad_VH += grad_XV.t() @ self.hidden_MH[chunk]
        return grad_MH, grad_VH, grad_V


def _logprobs_of_logits(
    logits_XV: torch.Tensor, target_X: torch.Tensor, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, entropies, log-sum-exps, (X,) each, and exp(logits - max), (X, V). Overwrites the logits."""
    max_X1 = logits_XV.amax(dim=-1, keepdim=True)
    shifted_XV = logits_XV.sub_(max_X1)
    target_logit_X = shifted_XV.gather(-1, target_X[:, None])[:, 0]
    exp_XV = shifted_XV.exp()
    sum_X = exp_XV.sum(dim=-1)
    log_sum_X = sum_X.log()
    entropy_X = torch.zeros_like(log_sum_X)
    if entropy:
        entropy_X = log_sum_X - torch.linalg.vecdot(exp_XV, shifted_XV.clamp_(min=LOWEST_LOGIT)) / sum_X
    return target_logit_X - log_sum_X, entropy_X, log_sum_X + max_X1[:, 0], exp_XV


def _normalise(exp_XV: torch.Tensor) -> torch.Tensor:
    """Divides each row by its sum, in place."""
    return exp_XV.div_(exp_XV.sum(dim=-1, keepdim=True))


def _gradient_of_logits(
    logits_XV: torch.Tensor, target_X: torch.Tensor, logsumexp_X: torch.Tensor, grad_X: torch.Tensor
) -> torch.Tensor:
    """The gradient of the logits, ``grad * (onehot(target) - p)``, (X, V). Overwrites the logits."""
    grad_XV = logits_XV.sub_(logsumexp_X[:, None]).exp_().mul_(-grad_X[:, None])
    return grad_XV.scatter_add_(-1, target_X[:, None], grad_X[:, None])
