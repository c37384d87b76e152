"""Log-probabilities and entropies of completion tokens, from packed rows.

The vocabulary is the widest dimension of a small model, so logits are the largest tensor. They are computed only for
positions that predict a completion token, and for a few hundred of these at a time.

Shapes: ``R`` rows, ``T`` tokens of a row, ``M`` tokens of all completions, ``S`` completions, ``H`` hidden size, ``V``
vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from online_dpo.modeling.attention.masks import attention_inputs
from online_dpo.modeling.attention.rows import fitted_rows
from online_dpo.modeling.fused_head import linear_logprobs, token_logprobs
from online_dpo.modeling.introspection import accepts_argument, unwrapped
from online_dpo.modeling.last_layer import enable_selective_last_layer, last_layer_kwargs
from online_dpo.modeling.weight_casts import weights_cast_once
from online_dpo.types import PackedRows, RowLogprobs

CHUNK_LOGITS = {"cpu": 2**23}
CHUNK_LOGITS_ELSEWHERE = 2**28
"""Logits (tokens times vocabulary) that exist at the same time. On a CPU few enough to stay in its caches.

On a GPU many, for what a chunk costs whatever its size: the head is read by each product (2 V H bytes in bf16), and the
gradient of its weight is read and written (8 V H). An H100 (990 TFLOP/s, 3.35 TB/s, 132 processors, 50 MB of cache)
takes 8 V H / 3.35e12 s for the latter and 2 X V H / 990e12 s for its product with X tokens: as long at X = 1182, so a
chunk has more, and cuBLAS hides the one behind the other. With a vocabulary of 151 936 these are 1766 tokens. Tiles of
128 x 256 numbers then fill its processors 62 times, so that a last wave that is not full costs 1 % or 2 %. Chunks that
stay in its cache (82 tokens) would save 8 bytes a logit, and read the head for 22 bytes a logit (H = 896). The memory
is 1 GiB, and 0.5 GiB for gradients in bf16: part of the peak that `sizing.passing.logit_bytes` estimates.
"""

_linear_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""The result of `_is_linear` for each model."""


@dataclass(frozen=True)
class LogprobRequest:
    """Asks a model for log-probabilities instead of logits (see `enable_logprobs`).

    ``source_M``, ``read_X`` and ``target_M`` are as in `PackedRows`; without ``entropy``, entropies are zeros.
    """

    source_M: torch.Tensor
    read_X: torch.Tensor
    target_M: torch.Tensor
    entropy: bool


def row_logprobs(model: nn.Module, rows: PackedRows, entropy: bool = True, chunked: bool = True) -> RowLogprobs:
    """Log-probabilities of all completion tokens in one forward pass, at temperature 1, with the log-sum-exp in fp32.

    The model is called through its root module, so that its wrappers work (DDP, FSDP, autocast, adapters). Without
    ``entropy``, that field is zeros.

    Args:
        chunked: compute logits in chunks; needs `enable_logprobs`. Otherwise the model returns all logits from the
            first position on that predicts a completion token.
    """
    rows = fitted_rows(model, rows)
    inputs = {"input_ids": rows.tokens.ids_RT, "use_cache": False} | attention_inputs(model, rows.tokens)
    if chunked:
        token_logps_M, entropy_M = model(
            **inputs, logprob_request=LogprobRequest(rows.source_M, rows.read_X, rows.target_M, entropy)
        )
    else:
        token_logps_M, entropy_M = token_logprobs(_all_logits(model, inputs, rows), rows.target_M, entropy)
    logps_S = torch.segment_reduce(token_logps_M, "sum", lengths=rows.length_S, unsafe=True)
    return RowLogprobs(token_logps_M, entropy_M, logps_S)


def enable_logprobs(model: nn.Module) -> None:
    """Lets ``model(..., logprob_request=LogprobRequest(...))`` return log-probabilities and entropies, (M,) each, fp32.

    The request is an argument of ``forward`` because sharded and data-parallel models can only be called there. Without
    it nothing changes. Models without separate body and head (see `can_chunk`) are left as they are.
    """
    base: Any = unwrapped(model)
    if not can_chunk(model) or hasattr(base, "forward_of_logits"):
        return

    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, logprob_request: LogprobRequest | None = None, **kwargs: Any) -> Any:
        if logprob_request is None:
            return self.forward_of_logits(*args, **kwargs)
        return _requested_logprobs(self, logprob_request, *args, **kwargs)

    base.forward_of_logits = base.forward
    base.forward = MethodType(
        forward, base
    )  # a bound method, which `deepcopy` binds to the copy; a closure would not be
    enable_selective_last_layer(model)


def can_chunk(model: nn.Module) -> bool:
    """Whether the model has a body, which computes hidden states, and a separate output head."""
    base: Any = unwrapped(model)
    if not isinstance(base, PreTrainedModel):
        return False
    return base.base_model is not base and base.get_output_embeddings() is not None


def _requested_logprobs(
    model: Any, request: LogprobRequest, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the model's body, and its head on the positions of the request."""
    # PEFT passes every argument of `forward`, mostly as None, and not all of them are arguments of the body.
    given = {name: value for name, value in kwargs.items() if value is not None}
    hidden_RTH = model.base_model(*args, **given, **last_layer_kwargs(model, request.read_X))[0]
    return _chunked_logprobs(model, hidden_RTH.flatten(0, 1)[request.source_M], request)


def _chunked_logprobs(
    model: Any, hidden_MH: torch.Tensor, request: LogprobRequest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies from hidden states: by `linear_logprobs` if the head is linear, else by the
    model's own head, whose chunks are recomputed in the backward pass (gradient checkpointing).
    """
    head = model.get_output_embeddings()
    size = chunk_size(model.config.get_text_config().vocab_size, hidden_MH.device)
    if model not in _linear_heads:
        _linear_heads[model] = _is_linear(model)
    if _linear_heads[model] and _is_plain_linear(head):
        return linear_logprobs(hidden_MH, head.weight, head.bias, request.target_M, request.entropy, size)
    if head._forward_hooks or head._forward_pre_hooks:
        # Each call of a sharded head is a collective operation, and ranks may have different numbers of chunks.
        size = max(1, len(hidden_MH))
    parts = []
    with nullcontext() if torch.is_grad_enabled() else weights_cast_once(head):
        for hidden_XH, target_X in zip(hidden_MH.split(size), request.target_M.split(size), strict=True):
            run = functools.partial(_project, model, itertools.count(), request.entropy)
            if hidden_MH.requires_grad:
                # Checkpointing restores the random state for the recomputation: adapters on the head may have dropout.
                parts.append(checkpoint(run, hidden_XH, target_X, use_reentrant=False))
            else:
                parts.append(run(hidden_XH, target_X))
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def _project(
    model: Any, runs: itertools.count, entropy: bool, hidden_XH: torch.Tensor, target_X: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of one chunk. ``runs`` counts calls: the second, for the backward pass, computes
    no entropies, since they have no gradient.
    """
    first = next(runs) == 0
    return token_logprobs(_head(model, hidden_XH), target_X, entropy and first)


def _head(model: Any, hidden_XH: torch.Tensor) -> torch.Tensor:
    """The model's own logits for hidden states.

    Many models do more than a matrix product here: biases, soft caps, scales, adapters on the head. So the model's own
    forward runs, while its body is replaced by a module that returns the given hidden states.
    """
    name = model.base_model_prefix
    body = model._modules[name]
    model._modules[name] = _FixedBody(hidden_XH[None])
    try:
        return model.forward_of_logits(inputs_embeds=hidden_XH[None], use_cache=False).logits[0]
    finally:
        model._modules[name] = body


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """The number of tokens whose logits are computed at the same time."""
    return max(1, CHUNK_LOGITS.get(device.type, CHUNK_LOGITS_ELSEWHERE) // vocabulary)


@torch.no_grad()
def _is_linear(model: Any) -> bool:
    """Whether the model's logits are the matrix product of its head and nothing more.

    It is tried on hidden states far from 0, where soft caps and scales change the result.
    """
    head = model.get_output_embeddings()
    if not _is_plain_linear(head):
        return False
    size = head.weight.shape[1]
    hidden_XH = torch.linspace(-20, 20, 4 * size, device=head.weight.device).view(4, size).to(head.weight.dtype)
    return torch.equal(_head(model, hidden_XH), head(hidden_XH))


def _is_plain_linear(head: Any) -> bool:
    """Whether the head is a plain linear layer whose weight can be used directly: no adapter, shard, hook or
    quantisation. Otherwise the head must be called as a module.
    """
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.weight.dim() == 2
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or "forward" in vars(head))
    )


class _FixedBody(nn.Module):
    """A model body that returns fixed hidden states, whatever its input."""

    def __init__(self, hidden_RTH: torch.Tensor) -> None:
        super().__init__()
        self.hidden_RTH = hidden_RTH

    def forward(self, *args: Any, **kwargs: Any) -> _BodyOutput:
        return _BodyOutput((self.hidden_RTH,))


class _BodyOutput(tuple):
    """The output of `_FixedBody`: hidden states, and ``None`` for every other field that a model may read."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


def _all_logits(model: nn.Module, inputs: dict[str, Any], rows: PackedRows) -> torch.Tensor:
    """The logits that predict completion tokens, (M, V), selected from those that the model returns.

    Models that take ``logits_to_keep`` return them only from the first such position on.
    """
    length = rows.tokens.ids_RT.shape[1]
    row_M, column_M = rows.source_M // length, rows.source_M % length
    first = 0
    if accepts_argument(model, "logits_to_keep"):
        first = int(column_M.min())
        inputs = inputs | {"logits_to_keep": length - first}
    return model(**inputs).logits[row_M, column_M - first]
