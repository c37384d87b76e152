"""Prefill and decoding steps in which the completions of a group share the keys and values of their prompt.

The model's code is unchanged. Only its attention function is replaced, by the one that uses our `KVCache`.

Shapes: ``G`` groups, ``K`` completions of each, ``B = G * K`` sequences, ``P`` prompt slots (the length of the longest
prompt), ``C`` completion slots, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from online_dpo.modeling.attention.masks import attention_inputs, layer_kinds, window_of
from online_dpo.modeling.introspection import (
    accepts_argument,
    passes_kwargs_to_attention,
    unwrapped,
    without_router_logits,
)
from online_dpo.modeling.last_layer import last_layer_kwargs
from online_dpo.packing.prefix_tree import PADDING, split_by_padded_size
from online_dpo.rollout.builtin.kv_cache import KVCache, kv_cache_attention
from online_dpo.rollout.builtin.sampling import next_tokens
from online_dpo.rollout.params import SamplingParams
from online_dpo.types import TokenRows

KINDS = {"full_attention", "sliding_attention"}
PREFILL_TOKENS = {"cpu": 1024}
PREFILL_TOKENS_ELSEWHERE = 16384
"""Padded prompt tokens of one prefill pass, by device: on a CPU few enough for activations to stay in its caches."""


def can_decode(model: nn.Module) -> bool:
    """Whether `Decoder` can run the model: full or sliding-window attention layers only, all of which call the
    attention function of `transformers`, and a ``forward`` that takes ``position_ids``.
    """
    if not passes_kwargs_to_attention(model):
        return False
    kinds = set(layer_kinds(unwrapped(model).config.get_text_config()))
    return kinds <= KINDS and accepts_argument(model, "position_ids")


class StepwiseDecoder(Protocol):
    """Computes next-token logits of K completions of each prompt, one token at a time. See `Decoder`."""

    def prefill(self) -> torch.Tensor:
        """Computes the prompts; returns the logits after each of them, (G, V)."""
        ...

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        """Appends one token to each sequence; returns the logits after it, (B, V)."""
        ...

    def keep_only(self, rows_GK: torch.Tensor) -> None:
        """Drops all sequences but these, given by their present indices, (G', K'). Each row belongs to one group."""
        ...

    def sample(
        self, token_B: torch.Tensor, uniform_B: torch.Tensor, params: SamplingParams, seen_BV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends one token to each sequence and draws the next: its id and its log-probability, (B,) each.

        For the arguments see `next_tokens`.
        """
        logits_BV = self.step(token_B)
        return next_tokens(logits_BV, logits_BV, uniform_B, params, seen_BV)

    def rows(self, groups: int, num_completions: int) -> int:
        """The number of sequences that a step computes for this many groups, with this many completions of each."""
        return groups * num_completions


class Decoder(StepwiseDecoder):
    """Prefills prompts, then computes the logits after one more token of each completion in each step.

    Args:
        model: in eval mode; `can_decode` must be true for it.
        prompts: token ids; may differ in length.
        num_completions: K.
        max_new_tokens: the largest number of tokens of a completion.
    """

    def __init__(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], num_completions: int, max_new_tokens: int
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.prompts, self.num_completions = prompts, num_completions
        self.lengths_G = torch.tensor([len(ids) for ids in prompts], device=self.device)
        # With prompts of one length there is no padding, so a query attends to every slot that is read: no mask needed.
        self._needs_no_mask = len({len(ids) for ids in prompts}) == 1
        self.kv_cache = KVCache(len(prompts), num_completions, max(map(len, prompts)), max_new_tokens)
        self._base: Any = unwrapped(model)  # once, and not in every step
        self.config: Any = self._base.config.get_text_config()
        self._windows = {kind: window_of(self.config, kind) for kind in set(layer_kinds(self.config))}
        self._no_router_logits = without_router_logits(model)
        self._last_only = {"logits_to_keep": 1} if accepts_argument(model, "logits_to_keep") else {}

    def prefill(self) -> torch.Tensor:
        """Computes all prompts; returns the logits after each of them, (G, V).

        Prompts are sorted by length, so that those of one pass need little padding. A pass has at most `PREFILL_TOKENS`
        padded tokens, or a single prompt, so that its activations stay small.
        """
        budget = PREFILL_TOKENS.get(self.device.type, PREFILL_TOKENS_ELSEWHERE)
        order = sorted(range(len(self.prompts)), key=lambda g: len(self.prompts[g]))
        parts = []
        with kv_cache_attention(self.config):
            for chosen in split_by_padded_size(order, [len(ids) for ids in self.prompts], budget):
                self.kv_cache.begin_prompts(torch.tensor(chosen, device=self.device))
                parts.append(self._prefill([self.prompts[g] for g in chosen]))
        logits_GV = torch.cat(parts)
        return logits_GV[torch.tensor(order, device=self.device).argsort()]

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        """Appends one token to each sequence; returns the logits after it, (B, V)."""
        self.kv_cache.advance()
        return self._forward(token_B, self.lengths_G, self.num_completions)

    def keep_only(self, rows_GK: torch.Tensor) -> None:
        """Drops all sequences but these, given by their present indices, (G', K'). Each row belongs to one group."""
        group_G = rows_GK[:, 0] // self.num_completions
        self.lengths_G = self.lengths_G[group_G]
        self.kv_cache.keep_only(group_G, rows_GK.flatten())
        self.num_completions = rows_GK.shape[1]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Computes these prompts in one pass; returns the logits after each of them, (G, V)."""
        length = max(map(len, prompts))
        # Padding on the left: then the last position of every row is the one that predicts the first token.
        ids = [[0] * (length - len(p)) + list(p) for p in prompts]
        tree = [[PADDING] * (length - len(p)) + [0] * len(p) for p in prompts]
        tree_GP = torch.tensor(tree, device=self.device)
        positions_GP = ((tree_GP != PADDING).cumsum(dim=1) - 1).clamp(min=0)
        tokens = TokenRows(
            ids_RT=torch.tensor(ids, device=self.device),
            positions_RT=positions_GP,
            tree_RT=tree_GP,
            branch_RT=torch.zeros_like(tree_GP),
            shares_prompts=True,
        )
        inputs = attention_inputs(self.model, tokens)
        if set(self._windows) == {"full_attention"} and all(len(p) == length for p in prompts):
            inputs["attention_mask"] = None  # plain causal attention: SDPA has a faster kernel for it than for a mask
        if self._last_only:  # the logits of other positions are not wanted, so the last layer may skip them too
            last_G = torch.arange(1, len(prompts) + 1, device=self.device) * length - 1
            inputs |= last_layer_kwargs(self._base, last_G)
        output = self.model(
            input_ids=tokens.ids_RT, use_cache=False, kv_cache=self.kv_cache, **inputs, **self._last_only
        )
        return output.logits[:, -1]

    def _forward(self, token_B: torch.Tensor, lengths_G: torch.Tensor, num_completions: int) -> torch.Tensor:
        """Runs one decoding step, with ``num_completions`` sequences for each prompt; returns the logits, (B, V)."""
        position_B1 = (lengths_G + self.kv_cache.slot).repeat_interleave(num_completions)[:, None]
        masks = {kind: self._hidden(lengths_G, window, num_completions) for kind, window in self._windows.items()}
        with kv_cache_attention(self.config):
            output = self.model(
                input_ids=token_B[:, None],
                position_ids=position_B1,
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                use_cache=False,
                kv_cache=self.kv_cache,
                **self._no_router_logits,
            )
        return output.logits[:, -1]

    def _hidden(self, lengths_G: torch.Tensor, window: int | None, num_completions: int) -> torch.Tensor | None:
        """The prompt and completion slots that queries of a step do not attend to, (B, 1, 1, P + C) bool; ``None`` if
        they attend to all of them. This form saves each layer the negation of an attention mask.

        It is computed from positions, which are also what a sliding ``window`` is measured in: padding has negative
        ones, and slots that are not written yet have later ones than the current token.
        """
        if window is None and self._needs_no_mask:
            return None
        kv_cache, length_G1 = self.kv_cache, lengths_G[:, None]
        slot_P = torch.arange(kv_cache.prompt_slots, device=self.device)
        position_GP = slot_P - (kv_cache.prompt_slots - length_G1)  # all prompts end in the last prompt slot
        slot_C = torch.arange(kv_cache.width, device=self.device)
        position_GX = torch.cat([position_GP, length_G1 + slot_C], dim=1)
        current_G1 = length_G1 + kv_cache.slot
        hidden_GX = (position_GX < 0) | (position_GX > current_G1)
        if window is not None:
            hidden_GX |= current_G1 - position_GX >= window
        return hidden_GX.repeat_interleave(num_completions, dim=0)[:, None, None]
