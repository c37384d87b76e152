"""The log-probabilities of `modeling.lm_head` for a GPU, where passes over the logits cost more than their products.

The same values, with fewer bytes: products of half-precision numbers give fp32 at once (cuBLAS adds up in fp32 anyway),
their sums are taken in one pass, gradients are written in the type of the products, and the weight's gradient is added
up in place by the product itself. Bytes of each logit, counted by ``benchmarks/head_passes.py`` (bf16 products):

========================================  ======  =====
                                          before  now
========================================  ======  =====
log-probabilities alone                       32      8
with entropies                                56      8
forward, head frozen                          84     16
forward, head trained                         56      8
backward, head trained                        42     14
========================================  ======  =====

Shapes as in `modeling.lm_head`; ``C`` columns, the vocabulary rounded up to whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from online_dpo.modeling.lm_head import LinearLogprobs, TokenLogprobs
from online_dpo.modeling.logit_kernels import BLOCK, LogitKernels, compiled_kernels

HALF = (torch.bfloat16, torch.float16)
DEVICES = ("cuda",)
"""Where this way is taken. It needs `product` in half precision, and pays off where memory is slow beside products."""


def token_logprobs(logits_XV: torch.Tensor, target_X: torch.Tensor, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of target tokens and entropies from logits, as the device computes them best."""
    if logits_XV.device.type in DEVICES:
        return FusedTokenLogprobs.apply(logits_XV, target_X, entropy, compiled_kernels())
    return TokenLogprobs.apply(logits_XV, target_X, entropy)


def linear_logprobs(
    hidden_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_M: torch.Tensor,
    entropy: bool,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of target tokens and entropies from a linear head, as the device computes them best."""
    inputs = hidden_MH, weight_VH, bias_V, target_M, entropy, size
    if hidden_MH.device.type in DEVICES:
        return FusedLinearLogprobs.apply(*inputs, compiled_kernels())
    return LinearLogprobs.apply(*inputs)


class FusedTokenLogprobs(torch.autograd.Function):
    """As `TokenLogprobs`: ``apply(logits_XV, target_X, entropy, kernels)``. Logits stay in their own type."""

    @staticmethod
    def forward(
        ctx: Any, logits_XV: torch.Tensor, target_X: torch.Tensor, entropy: bool, kernels: LogitKernels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log-probabilities and entropies."""
        with torch.autocast(logits_XV.device.type, enabled=False):
            logps_X, entropy_X, max_X, log_sum_X = kernels.sums(logits_XV, None, target_X, entropy)
        ctx.save_for_backward(logits_XV, target_X, max_X, log_sum_X)
        ctx.kernels = kernels
        ctx.mark_non_differentiable(entropy_X)
        return logps_X, entropy_X

    @staticmethod
    def backward(ctx: Any, grad_X: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the gradient with respect to the logits, in their dtype."""
        logits_XV, target_X, max_X, log_sum_X = ctx.saved_tensors
        with torch.autocast(logits_XV.device.type, enabled=False):
            grad_XV = ctx.kernels.gradient(
                logits_XV, None, target_X, max_X, log_sum_X, grad_X.contiguous(), logits_XV.dtype
            )
        return grad_XV, None, None, None


class FusedLinearLogprobs(torch.autograd.Function):
    """As `LinearLogprobs`: ``apply(hidden_MH, weight_VH, bias_V, target_M, entropy, size, kernels)``.

    With a trained head and a single chunk, its logits are kept for the backward pass; of several they are computed
    again.
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
        kernels: LogitKernels,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log-probabilities and entropies."""
        head = _FusedHead(hidden_MH, weight_VH, bias_V, target_M, size, kernels)
        trained = any(ctx.needs_input_grad[1:3])
        dlogp_MH = torch.empty_like(head.hidden_MH) if ctx.needs_input_grad[0] and not trained else None
        logits_XC, parts = None, []
        with torch.autocast(hidden_MH.device.type, enabled=False):  # the inputs have the wanted dtype already
            for chunk, logits_XC in head.chunks():
                parts.append(kernels.sums(logits_XC, head.bias_C, target_M[chunk], entropy))
                if dlogp_MH is not None:
                    _, _, max_X, log_sum_X = parts[-1]
                    dlogp_XV = head.gradient(logits_XC, chunk, max_X, log_sum_X, torch.ones_like(max_X))
                    torch.mm(dlogp_XV, head.weight_VH, out=dlogp_MH[chunk])
                    del dlogp_XV  # before the next one is made
        parts = parts or [(torch.empty(0, device=target_M.device),) * 4]  # no token at all
        logps_M, entropy_M, max_M, log_sum_M = (torch.cat(part) for part in zip(*parts, strict=True))
        if dlogp_MH is not None:
            ctx.save_for_backward(dlogp_MH)
        elif trained:
            kept = logits_XC if len(target_M) <= size else None
            ctx.save_for_backward(head.hidden_MH, head.weight_VH, bias_V, target_M, max_M, log_sum_M, kept)
        ctx.frozen, ctx.size, ctx.kernels = not trained, size, kernels
        ctx.dtypes = hidden_MH.dtype, weight_VH.dtype
        ctx.mark_non_differentiable(entropy_M)
        return logps_M, entropy_M

    @staticmethod
    def backward(ctx: Any, grad_M: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the gradients with respect to hidden states, weight and bias, in their dtypes."""
        hidden_dtype, weight_dtype = ctx.dtypes
        nothing = (None,) * 4
        if ctx.frozen:
            [dlogp_MH] = ctx.saved_tensors
            return (dlogp_MH * grad_M[:, None]).to(hidden_dtype), None, None, *nothing
        hidden_MH, weight_VH, bias_V, target_M, max_M, log_sum_M, kept = ctx.saved_tensors
        with torch.autocast(hidden_MH.device.type, enabled=False):
            head = _FusedHead(hidden_MH, weight_VH, bias_V, target_M, ctx.size, ctx.kernels, weight_VH.dtype)
            grad_MH, grad_VH, grad_V = head.gradients(max_M, log_sum_M, grad_M.contiguous(), kept)
        to_bias = None if bias_V is None else grad_V.to(bias_V.dtype)
        return grad_MH.to(hidden_dtype), grad_VH.to(weight_dtype), to_bias, *nothing


class _FusedHead:
    """A linear head in the dtype of its products, which computes logits and gradients chunk by chunk."""

    def __init__(
        self,
        hidden_MH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_M: torch.Tensor,
        size: int,
        kernels: LogitKernels,
        dtype: torch.dtype | None = None,
    ) -> None:
        device = hidden_MH.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype
        dtype = dtype or autocast
        self.hidden_MH, self.weight_VH, self.bias_V = hidden_MH.to(dtype), weight_VH.to(dtype), bias_V
        self.target_M, self.size, self.kernels = target_M, size, kernels
        self.columns = -(-len(weight_VH) // BLOCK) * BLOCK
        padding = (0, self.columns - len(weight_VH))
        self.bias_C = None if bias_V is None else torch.nn.functional.pad(bias_V.float(), padding)

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields each chunk's slice of the tokens and its logits in fp32, without bias, in whole blocks of columns.

        All chunks use one buffer, so the caller must be done with it before the next chunk.
        """
        count, vocabulary = len(self.hidden_MH), len(self.weight_VH)
        shape = (min(self.size, count), self.columns)
        buffer_XC = torch.empty(shape, dtype=torch.float32, device=self.hidden_MH.device)
        buffer_XC[:, vocabulary:] = -torch.inf
        for start in range(0, count, self.size):
            chunk = slice(start, min(start + self.size, count))
            logits_XC = buffer_XC[: chunk.stop - chunk.start]
            product(self.hidden_MH[chunk], self.weight_VH.t(), logits_XC[:, :vocabulary])
            yield chunk, logits_XC

    def gradient(
        self,
        logits_XC: torch.Tensor,
        chunk: slice,
        max_X: torch.Tensor,
        log_sum_X: torch.Tensor,
        grad_X: torch.Tensor,
    ) -> torch.Tensor:
        """The gradient of a chunk's logits, in the dtype of the products."""
        logits_XV, target_X = logits_XC[:, : len(self.weight_VH)], self.target_M[chunk]
        return self.kernels.gradient(logits_XV, self.bias_V, target_X, max_X, log_sum_X, grad_X, self.weight_VH.dtype)

    def gradients(
        self, max_M: torch.Tensor, log_sum_M: torch.Tensor, grad_M: torch.Tensor, kept_XC: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of hidden states, weight and bias, from those of the log-probabilities; sums are in fp32.

        Args:
            kept_XC: the logits of the only chunk, if they were kept.
        """
        grad_MH = torch.empty_like(self.hidden_MH)
        grad_VH = torch.empty_like(self.weight_VH, dtype=torch.float32)
        grad_V = grad_VH.new_zeros(len(grad_VH))
        if len(self.hidden_MH) == 0:
            grad_VH.zero_()
        for chunk, logits_XC in self.chunks() if kept_XC is None else [(slice(0, len(kept_XC)), kept_XC)]:
            grad_XV = self.gradient(logits_XC, chunk, max_M[chunk], log_sum_M[chunk], grad_M[chunk])
            torch.mm(grad_XV, self.weight_VH, out=grad_MH[chunk])
            product(grad_XV.t(), self.hidden_MH[chunk], grad_VH, add=chunk.start > 0)
            if self.bias_V is not None:
                grad_V += grad_XV.sum(dim=0, dtype=torch.float32)
            del grad_XV  # before the next one is made
        return grad_MH, grad_VH, grad_V


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
    """Writes ``a @ b`` to ``out``, which is in fp32, or adds it. Products of half-precision numbers are not rounded.

    ``mm`` with a type of its own for the result, and ``addmm`` with sums in that type, exist on CUDA only, for fp32
    from bf16 and fp16 (torch 2.11 and later).
    """
    if a.dtype not in HALF:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
