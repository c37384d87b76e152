"""Rows to log-probabilities: what a model gives each completion token, and how uncertain it was.

The vocabulary is the widest thing in a small model, so logits exist only where a completion token is predicted, and for
a few hundred tokens at a time.

Shapes: ``R`` rows, ``T`` tokens of a row, ``M`` tokens of all completions, ``S`` completions, ``H`` hidden size, ``V``
vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from online_dpo.modeling.attention.masks import attention_inputs
from online_dpo.modeling.introspection import accepts_argument, unwrapped
from online_dpo.modeling.last_layer import enable_selective_last_layer, last_layer_kwargs
from online_dpo.modeling.lm_head import LinearLogprobs, TokenLogprobs
from online_dpo.types import PackedRows, RowLogprobs

CHUNK_LOGITS = {"cpu": 2**23}  # logits that exist at the same time; on a CPU few enough to stay near the cores
CHUNK_LOGITS_ELSEWHERE = 2**27
_heads_are_linear: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What `_is_linear` has found, each model once."""


@dataclass(frozen=True)
class Predict:
    """Asks a model for log-probabilities in place of logits (see `enable_logprobs`)."""

    source_M: torch.Tensor
    read_X: torch.Tensor
    target_M: torch.Tensor
    entropy: bool


def row_logprobs(model: nn.Module, rows: PackedRows, entropy: bool = True, chunked: bool = True) -> RowLogprobs:
    """Log-probabilities of all completion tokens in one forward pass, at temperature 1, the log-sum-exp in fp32.

    Enters through the root module, so wrappers (DDP, FSDP, autocast, adapters) take part. Without ``entropy`` that
    field is zeros.

    Args:
        chunked: project onto the vocabulary in chunks; needs `enable_logprobs`. Otherwise the model returns all its
            logits from the first position that predicts a completion token on.
    """
    inputs = {"input_ids": rows.tokens.ids_RT, "use_cache": False} | attention_inputs(model, rows.tokens)
    if chunked:
        token_logps_M, entropy_M = model(**inputs, predict=Predict(rows.source_M, rows.read_X, rows.target_M, entropy))
    else:
        token_logps_M, entropy_M = TokenLogprobs.apply(_all_logits(model, inputs, rows), rows.target_M, entropy)
    logps_S = torch.segment_reduce(token_logps_M, "sum", lengths=rows.length_S, unsafe=True)
    return RowLogprobs(token_logps_M, entropy_M, logps_S)


def enable_logprobs(model: nn.Module) -> None:
    """Let ``model(..., predict=Predict(...))`` return log-probabilities and entropies, (M,) each, in fp32.

    The request travels through ``forward`` because sharded and data-parallel models can only be entered there. Without
    ``predict``, nothing changes; models that cannot (see `can_chunk`) are left as they are.
    """
    base: Any = unwrapped(model)
    if not can_chunk(model) or hasattr(base, "forward_of_logits"):
        return

    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, predict: Predict | None = None, **kwargs: Any) -> Any:
        if predict is None:
            return self.forward_of_logits(*args, **kwargs)
        return _predicted(self, predict, *args, **kwargs)

    base.forward_of_logits = base.forward
    base.forward = MethodType(forward, base)  # bound, so that a copy of the model calls the copy's own
    enable_selective_last_layer(model)


def can_chunk(model: nn.Module) -> bool:
    """Whether the model has a part that gives hidden states, and a head that comes after it."""
    base: Any = unwrapped(model)
    if not isinstance(base, PreTrainedModel):
        return False
    return base.base_model is not base and base.get_output_embeddings() is not None


def _predicted(model: Any, predict: Predict, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    given = {name: value for name, value in kwargs.items() if value is not None}  # adapters fill in all arguments
    hidden_RTH = model.base_model(*args, **given, **last_layer_kwargs(model, predict.read_X))[0]
    return _chunked_logprobs(model, hidden_RTH.flatten(0, 1)[predict.source_M], predict)


def _chunked_logprobs(model: Any, hidden_MH: torch.Tensor, predict: Predict) -> tuple[torch.Tensor, torch.Tensor]:
    head = model.get_output_embeddings()
    size = chunk_size(model.config.get_text_config().vocab_size, hidden_MH.device)
    if model not in _heads_are_linear:
        _heads_are_linear[model] = _is_linear(model)
    if _heads_are_linear[model] and _is_bare(head):
        return LinearLogprobs.apply(hidden_MH, head.weight, head.bias, predict.target_M, predict.entropy, size)
    if head._forward_hooks or head._forward_pre_hooks:
        size = max(1, len(hidden_MH))  # each call of a sharded head is a collective operation: one on every rank
    parts = []
    for hidden_XH, target_X in zip(hidden_MH.split(size), predict.target_M.split(size), strict=True):
        run = functools.partial(_project, model, itertools.count(), predict.entropy)
        if hidden_MH.requires_grad:
            parts.append(checkpoint(run, hidden_XH, target_X, use_reentrant=False))  # adapters may have dropout
        else:
            parts.append(run(hidden_XH, target_X))
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def _project(
    model: Any, runs: itertools.count, entropy: bool, hidden_XH: torch.Tensor, target_X: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of one chunk; the entropies only in the first of its runs."""
    first = next(runs) == 0
    return TokenLogprobs.apply(_head(model, hidden_XH), target_X, entropy and first)


def _head(model: Any, hidden_XH: torch.Tensor) -> torch.Tensor:
    """The model's own logits for hidden states.

    Models do more than a matrix product there: biases, soft caps, scales, adapters on the head. So the model's own
    forward runs, with something in the place of its body that returns the hidden states.
    """
    name = model.base_model_prefix
    body = model._modules[name]
    model._modules[name] = _Given(hidden_XH[None])
    try:
        return model.forward_of_logits(inputs_embeds=hidden_XH[None], use_cache=False).logits[0]
    finally:
        model._modules[name] = body


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits exist at the same time."""
    return max(1, CHUNK_LOGITS.get(device.type, CHUNK_LOGITS_ELSEWHERE) // vocabulary)


@torch.no_grad()
def _is_linear(model: Any) -> bool:
    """Whether the model's logits are its head's matrix product and nothing else, found on hidden states far from 0."""
    head = model.get_output_embeddings()
    if not _is_bare(head):
        return False
    size = head.weight.shape[1]
    hidden_XH = torch.linspace(-20, 20, 4 * size, device=head.weight.device).view(4, size).to(head.weight.dtype)
    return torch.equal(_head(model, hidden_XH), head(hidden_XH))


def _is_bare(head: Any) -> bool:
    """Whether the head is a plain linear layer with its weights at hand: no adapter, shard, hook or quantisation.

    Otherwise the head is called as a module, and its weights are its own business.
    """
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.weight.dim() == 2
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or "forward" in vars(head))
    )


class _Given(nn.Module):
    """A body that returns the hidden states it was made with, whatever it is given."""

    def __init__(self, hidden_RTH: torch.Tensor) -> None:
        super().__init__()
        self.hidden_RTH = hidden_RTH

    def forward(self, *args: Any, **kwargs: Any) -> _BodyOutput:
        return _BodyOutput((self.hidden_RTH,))


class _BodyOutput(tuple):
    """Hidden states, and ``None`` for everything else that some body returns beside them."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


def _all_logits(model: nn.Module, inputs: dict[str, Any], rows: PackedRows) -> torch.Tensor:
    """The logits that predict completion tokens, (M, V), out of all that the model returns."""
    length = rows.tokens.ids_RT.shape[1]
    row_M, place_M = rows.source_M // length, rows.source_M % length
    first = 0
    if accepts_argument(model, "logits_to_keep"):
        first = int(place_M.min())
        inputs = inputs | {"logits_to_keep": length - first}
    return model(**inputs).logits[row_M, place_M - first]
