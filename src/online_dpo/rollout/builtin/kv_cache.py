"""The key/value cache of the built-in sampler, and the attention function that writes to it and reads from it.

While a decoder runs, the attention function that `transformers` calls is replaced by one that uses this cache
(`kv_cache_attention`). The caches of `transformers` keep the keys and values of a prompt once for each of its K
completions. This one keeps them once for each prompt: K times less memory and memory traffic for prompts. All
completions of a group attend to their prompt in one matrix product, and so do all query heads that share a key/value
head. Entries stay where they were written, so a decoding step copies nothing.

A *slot* is a place for one token in the cache.

Shapes: ``G`` groups, ``K`` completions of each, ``B = G * K`` sequences, ``P`` prompt slots (the length of the longest
prompt), ``C`` completion slots, ``N`` key/value heads, ``Q`` query heads for each of them, ``D`` head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "online_dpo_decode"
FIRST_SLOTS = 64
"""Completion slots that are allocated first. From then on their number is doubled, so that copies stay rare."""


@dataclass
class KVLayer:
    """Cached keys and values of one layer: of prompts (G, N, P, D) and of completions (B, N, C, D).

    Prompts are padded on the left, so that all of them end in the last prompt slot. All are in the dtype that the
    attention's products compute in, so that no step converts what earlier ones have written.
    """

    prompt_keys: torch.Tensor
    prompt_values: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def like(cls, key: torch.Tensor, value: torch.Tensor, groups: int, prompts: int, rows: int, slots: int) -> KVLayer:
        """Allocates an empty layer with the heads, head sizes and dtypes of ``key`` and ``value``.

        It is filled with zeros: masked slots are still multiplied with a probability of 0, and uninitialised memory may
        hold infinities or nan, which would make the product nan.

        Args:
            prompts: prompt slots of each of the ``groups``.
            slots: completion slots of each of the ``rows``.
        """
        of_prompts, of_completions = (groups, key.shape[1], prompts), (rows, key.shape[1], slots)
        return cls(
            key.new_zeros(*of_prompts, key.shape[3]),
            value.new_zeros(*of_prompts, value.shape[3]),
            key.new_zeros(*of_completions, key.shape[3]),
            value.new_zeros(*of_completions, value.shape[3]),
        )


class KVCache:
    """Cached keys and values of all layers. Completion slots are added as completions grow.

    ``slot`` is where the current token of each completion is written (-1 before the first one); ``width`` is the number
    of completion slots that queries read.

    Args:
        groups: G. num_completions: K.
        prompt_slots: P. max_new_slots: the largest number of completion slots.
    """

    def __init__(self, groups: int, num_completions: int, prompt_slots: int, max_new_slots: int) -> None:
        self.groups, self.sequences = groups, groups * num_completions
        self.prompt_slots, self.max_new_slots = prompt_slots, max_new_slots
        self.slot: Any = -1
        self.layers: dict[int, KVLayer] = {}
        self._prompt_group_X: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """The number of completion slots in use."""
        return self.slot + 1

    def begin_prompts(self, group_X: torch.Tensor) -> None:
        """Starts a prefill: the next forward pass writes the prompts of these groups, given by their indices, (X,)."""
        self._prompt_group_X = group_X

    def advance(self) -> None:
        """Starts a decoding step: the next forward pass writes one token of each completion, in the next slot."""
        self._prompt_group_X = None
        self.slot += 1
        for layer in self.layers.values():
            if self.slot >= layer.keys.shape[2]:
                slots = min(max(FIRST_SLOTS, 2 * self.slot), self.max_new_slots)
                layer.keys = _grown(layer.keys, self.sequences, slots)
                layer.values = _grown(layer.values, self.sequences, slots)

    def keep_only(self, group_G: torch.Tensor, row_B: torch.Tensor) -> None:
        """Drops all groups and sequences but these, given by their present indices; these are then numbered anew."""
        self.groups, self.sequences = len(group_G), len(row_B)
        for layer in self.layers.values():
            layer.prompt_keys, layer.prompt_values = layer.prompt_keys[group_G], layer.prompt_values[group_G]
            if self.width:
                layer.keys, layer.values = layer.keys[row_B], layer.values[row_B]

    def prompt_layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> KVLayer:
        """The layer with this index, allocated at its first use, for the keys and values of prompts."""
        if index not in self.layers:
            self.layers[index] = KVLayer.like(key, value, self.groups, self.prompt_slots, 0, 0)
        return self.layers[index]

    def write(self, index: int, key: torch.Tensor, value: torch.Tensor) -> KVLayer:
        """Writes the key and value of the current token of each completion; returns views of all that queries read.

        They are converted to the dtype of the cache.
        """
        layer = self.layers[index]
        layer.keys[:, :, self.slot : self.width] = key
        layer.values[:, :, self.slot : self.width] = value
        written = (layer.keys[:, :, : self.width], layer.values[:, :, : self.width])
        return KVLayer(layer.prompt_keys, layer.prompt_values, *written)

    def write_and_attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Writes keys and values into the cache, and returns the attention output, (B, tokens, heads, D).

        Args:
            mask: in a prefill what queries attend to, else what they do not: see `attend`.
        """
        index: Any = module.layer_idx
        if self._prompt_group_X is None:
            return attend(query, self.write(index, key, value), mask, scaling, options)
        key, value = _as_multiplied(key), _as_multiplied(value)
        layer, length = self.prompt_layer(index, key, value), key.shape[2]
        layer.prompt_keys[self._prompt_group_X, :, layer.prompt_keys.shape[2] - length :] = key
        layer.prompt_values[self._prompt_group_X, :, layer.prompt_values.shape[2] - length :] = value
        if options:
            return _read_prompt(query, key, value, mask, scaling, options)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]


@contextmanager
def kv_cache_attention(config: Any) -> Iterator[None]:
    """Inside, models with this config attend through the `KVCache` that is passed to them as ``kv_cache``."""
    previous = config._attn_implementation
    AttentionInterface.register(NAME, _attention)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = previous


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kv_cache: KVCache,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that `transformers` calls. Some models use ``softcap`` or ``s_aux`` (attention sinks)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {"softcap": softcap, "sinks_H": s_aux} if softcap is not None or s_aux is not None else {}
    return kv_cache.write_and_attend(module, query, key, value, attention_mask, scale, options), None


def attend(
    query: torch.Tensor, layer: KVLayer, hidden: torch.Tensor | None, scaling: float, options: dict[str, Any]
) -> torch.Tensor:
    """Attention of one query of each sequence, (B, heads, 1, D), to its prompt and to its own tokens.

    Scores of prompt slots and of completion slots are computed apart, because their keys are stored apart, and go
    through one softmax.

    Args:
        hidden: the slots that a query does not attend to, (B, 1, 1, P + C) bool; ``None``: it attends to all.
    """
    groups, kv_heads, prompt_slots, size = layer.prompt_keys.shape
    sequences, heads = query.shape[:2]
    queries_per_head, completions = heads // kv_heads, sequences // groups

    def by_group(x_BNQX: torch.Tensor) -> torch.Tensor:
        """(B, N, Q, X) to (G, N, K * Q, X), so that one product serves all completions of a group."""
        x_GKNQX = x_BNQX.view(groups, completions, kv_heads, queries_per_head, -1)
        return x_GKNQX.transpose(1, 2).reshape(groups, kv_heads, completions * queries_per_head, -1)

    def by_sequence(x_GNYX: torch.Tensor) -> torch.Tensor:
        """(G, N, K * Q, X) back to (B, N, Q, X)."""
        x_GNKQX = x_GNYX.view(groups, kv_heads, completions, queries_per_head, -1)
        return x_GNKQX.transpose(1, 2).reshape(sequences, kv_heads, queries_per_head, -1)

    query_BNQD = (query.reshape(sequences, kv_heads, queries_per_head, size) * scaling).to(layer.keys.dtype)
    prompt_scores_BNQP = by_sequence(_product(by_group(query_BNQD), layer.prompt_keys.mT))
    completion_scores_BNQC = _product(query_BNQD, layer.keys.mT)
    scores = torch.cat([prompt_scores_BNQP, completion_scores_BNQC], dim=-1)
    probs = _softmax(scores, hidden, options).to(layer.values.dtype)
    output = by_sequence(_product(by_group(probs[..., :prompt_slots]), layer.prompt_values))
    output = output + _product(probs[..., prompt_slots:], layer.values)
    return output.reshape(sequences, 1, heads, -1)


def _product(x_XNYZ: torch.Tensor, y_XNZW: torch.Tensor) -> torch.Tensor:
    """The products of matrices in the last two dimensions. A compiler would compile ``@`` for each way in which such
    parts of a cache can lie in memory.
    """
    product = torch.bmm(x_XNYZ.flatten(0, 1), y_XNZW.flatten(0, 1))
    return product.view(*x_XNYZ.shape[:3], y_XNZW.shape[3])


def _read_prompt(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    options: dict[str, Any],
) -> torch.Tensor:
    """Prefill attention of all queries of prompts, (G, heads, P, D), with a soft cap or sinks, which SDPA cannot do."""
    groups, kv_heads, length, size = key.shape
    query = query.reshape(groups, kv_heads, -1, size) * scaling  # (G, N, Q * P, D)
    scores = (query @ key.mT).view(groups, kv_heads, -1, length, length)
    if mask is None:
        hidden = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)[None, None]
    else:
        hidden = ~mask
    scores = scores.flatten(1, 2)
    probs = _softmax(scores, hidden, options).to(value.dtype).view(groups, kv_heads, -1, length)
    return (probs @ value).view(groups, -1, length, value.shape[-1]).transpose(1, 2)


def _softmax(scores: torch.Tensor, hidden: torch.Tensor | None, options: dict[str, Any]) -> torch.Tensor:
    """Attention probabilities, computed in fp32, with the model's soft cap and attention sinks, if any.

    ``scores`` have key/value heads in dimension 1 and the query heads of each in dimension 2, or all query heads in
    dimension 1. A sink takes a part of the probability and gives no value, so its column is dropped at the end.
    """
    if scores.is_cuda and not options:
        # A GPU's softmax computes in fp32 whatever it reads and writes. `torch.softmax` is one that autocast converts
        # to fp32 and back, which are two more kernels.
        shown = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
        return torch.ops.aten._softmax.default(shown, -1, False)
    scores = scores.float()
    softcap, sinks_H = options.get("softcap"), options.get("sinks_H")
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if sinks_H is None:
        return scores.softmax(dim=-1)
    sinks = sinks_H.float().view(1, scores.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]


def _as_multiplied(x: torch.Tensor) -> torch.Tensor:
    """A tensor in the dtype in which its matrix products are computed: autocast's, if it is on.

    Rotary embeddings compute in fp32 under autocast. If their keys stayed in fp32, autocast would convert the whole
    cache again for each product.
    """
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _grown(kept: torch.Tensor, sequences: int, slots: int) -> torch.Tensor:
    """A copy with more slots. An empty tensor (before the first decoding step) also gets its rows, ``sequences``."""
    grown = kept.new_zeros(sequences, kept.shape[1], slots, kept.shape[3])
    grown[: len(kept), :, : kept.shape[2]] = kept
    return grown
