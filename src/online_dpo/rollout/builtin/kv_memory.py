"""Keys and values while sampling, and the attention that reads them.

While a decoder is at work, the attention function of `transformers` is ours (`our_attention`), and the keys and values
it sees go into a memory. Prompts are kept once, not once a completion, and the completions of a group read theirs
together; heads that share keys read them once; what is written stays where it is.

Shapes: ``G`` groups, ``K`` completions of each, ``B = G * K`` sequences, ``P`` places of the longest prompt, ``C``
places of completions, ``N`` key-value heads, ``Q`` query heads to each of them, ``D`` head size.
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
FIRST_PLACES = 64


@dataclass
class Layer:
    """The memory of one layer: of prompts (G, N, P, D), which end at the last place, of completions (B, N, C, D)."""

    prompt_keys: torch.Tensor
    prompt_values: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def like(cls, key: torch.Tensor, value: torch.Tensor, groups: int, prompts: int, rows: int, places: int) -> Layer:
        """Room for these counts, with the heads and types of ``key`` and ``value``.

        It is zeros, because what is masked out is still multiplied, with 0.
        """
        of_prompts, of_completions = (groups, key.shape[1], prompts), (rows, key.shape[1], places)
        return cls(
            key.new_zeros(*of_prompts, key.shape[3]),
            value.new_zeros(*of_prompts, value.shape[3]),
            key.new_zeros(*of_completions, key.shape[3]),
            value.new_zeros(*of_completions, value.shape[3]),
        )


class Memory:
    """Keys and values of all layers, with as many places for completions as they need by now.

    ``place`` is where the present token of completions is written, ``width`` how many places of completions are read.
    """

    def __init__(self, groups: int, num_completions: int, prompt_places: int, most_places: int) -> None:
        self.groups, self.sequences = groups, groups * num_completions
        self.prompt_places, self.most_places = prompt_places, most_places
        self.place: Any = -1
        self.layers: dict[int, Layer] = {}
        self._group_X: torch.Tensor | None = None

    @property
    def width(self) -> int:
        return self.place + 1

    def write_prompts(self, group_X: torch.Tensor) -> None:
        """What comes now belongs to the prompts of these groups."""
        self._group_X = group_X

    def next_place(self) -> None:
        """What comes now belongs to the next token of each completion."""
        self._group_X = None
        self.place += 1
        for layer in self.layers.values():
            if self.place >= layer.keys.shape[2]:
                places = min(max(FIRST_PLACES, 2 * self.place), self.most_places)
                layer.keys = _grown(layer.keys, self.sequences, places)
                layer.values = _grown(layer.values, self.sequences, places)

    def keep(self, group_G: torch.Tensor, row_B: torch.Tensor) -> None:
        self.groups, self.sequences = len(group_G), len(row_B)
        for layer in self.layers.values():
            layer.prompt_keys, layer.prompt_values = layer.prompt_keys[group_G], layer.prompt_values[group_G]
            if self.width:
                layer.keys, layer.values = layer.keys[row_B], layer.values[row_B]

    def prompts_of(self, index: int, key: torch.Tensor, value: torch.Tensor) -> Layer:
        """The layer that the prompts' keys and values are written to."""
        if index not in self.layers:
            self.layers[index] = Layer.like(key, value, self.groups, self.prompt_places, 0, 0)
        return self.layers[index]

    def write(self, index: int, key: torch.Tensor, value: torch.Tensor) -> Layer:
        """Writes down what belongs to the present token of each completion; returns what its query reads."""
        layer = self.layers[index]
        layer.keys[:, :, self.place : self.width] = key
        layer.values[:, :, self.place : self.width] = value
        own = (layer.keys[:, :, : self.width], layer.values[:, :, : self.width])
        return Layer(layer.prompt_keys, layer.prompt_values, *own)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Writes down keys and values, and what the queries read with them, (B, tokens, heads, D)."""
        index: Any = module.layer_idx
        if self._group_X is None:
            return _read(query, self.write(index, key, value), mask, scaling, options)
        layer, length = self.prompts_of(index, key, value), key.shape[2]
        layer.prompt_keys[self._group_X, :, layer.prompt_keys.shape[2] - length :] = key
        layer.prompt_values[self._group_X, :, layer.prompt_values.shape[2] - length :] = value
        if options:
            return _read_prompt(query, key, value, mask, scaling, options)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]


@contextmanager
def our_attention(config: Any) -> Iterator[None]:
    own = config._attn_implementation
    AttentionInterface.register(NAME, _attention)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    memory: Memory,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as `transformers` calls it; ``softcap`` and ``s_aux`` (sinks) are what some models add to it."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {"softcap": softcap, "sinks_H": s_aux} if softcap is not None or s_aux is not None else {}
    return memory.attend(module, query, key, value, attention_mask, scale, options), None


def _read(
    query: torch.Tensor, layer: Layer, mask: torch.Tensor | None, scaling: float, options: dict[str, Any]
) -> torch.Tensor:
    """One query of each sequence, (B, heads, 1, D), over its prompt and its own tokens."""
    groups, shared_heads, places, size = layer.prompt_keys.shape
    sequences, heads = query.shape[:2]
    per_head, of_group = heads // shared_heads, sequences // groups

    def gathered(x_BNQX: torch.Tensor) -> torch.Tensor:
        """(G, N, K * Q, X): a group's completions read their prompt together."""
        x_GKNQX = x_BNQX.view(groups, of_group, shared_heads, per_head, -1)
        return x_GKNQX.transpose(1, 2).reshape(groups, shared_heads, of_group * per_head, -1)

    def scattered(x_GNYX: torch.Tensor) -> torch.Tensor:
        x_GNKQX = x_GNYX.view(groups, shared_heads, of_group, per_head, -1)
        return x_GNKQX.transpose(1, 2).reshape(sequences, shared_heads, per_head, -1)

    query_BNQD = query.reshape(sequences, shared_heads, per_head, size) * scaling
    prompt_BNQP = scattered(gathered(query_BNQD) @ layer.prompt_keys.mT)
    own_BNQC = query_BNQD @ layer.keys.mT
    probs = _softmax(torch.cat([prompt_BNQP, own_BNQC], dim=-1), mask, options).to(query.dtype)
    read = scattered(gathered(probs[..., :places]) @ layer.prompt_values)
    read = read + probs[..., places:] @ layer.values
    return read.reshape(sequences, 1, heads, -1)


def _read_prompt(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    options: dict[str, Any],
) -> torch.Tensor:
    """All queries of prompts, (G, heads, P, D), where the model's attention is not that of SDPA."""
    groups, shared_heads, places, size = key.shape
    query = query.reshape(groups, shared_heads, -1, size) * scaling  # (G, N, Q * P, D)
    scores = (query @ key.mT).view(groups, shared_heads, -1, places, places)
    if mask is None:
        mask = torch.ones(places, places, dtype=torch.bool, device=key.device).tril()[None, None]
    scores = scores.flatten(1, 2)
    probs = _softmax(scores, mask, options).to(value.dtype).view(groups, shared_heads, -1, places)
    return (probs @ value).view(groups, -1, places, value.shape[-1]).transpose(1, 2)


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]) -> torch.Tensor:
    """Probabilities in fp32. Dimension 1 are key-value heads and 2 the queries to each, or 1 are all heads."""
    scores = scores.float()
    softcap, sinks_H = options.get("softcap"), options.get("sinks_H")
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks_H is None:
        return scores.softmax(dim=-1)
    sinks = sinks_H.float().view(1, scores.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]


def _grown(kept: torch.Tensor, sequences: int, places: int) -> torch.Tensor:
    """The same with more places; the first time, for as many sequences as there are."""
    grown = kept.new_zeros(sequences, kept.shape[1], places, kept.shape[3])
    grown[: len(kept), :, : kept.shape[2]] = kept
    return grown
