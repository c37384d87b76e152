"""Forward passes for sampling in which the completions of a group share their prompt's keys and values.

The model runs as it is, but for its attention, which writes to and reads from a memory of ours (`memory.py`).

Shapes: ``G`` groups, ``K`` completions of each, ``B = G * K`` sequences, ``P`` places of the longest prompt, ``C``
places of completions, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from online_dpo.modeling.attention.masks import attention_inputs, layer_kinds, window_of
from online_dpo.modeling.introspection import accepts_argument, hands_on_arguments, logits_alone, unwrapped
from online_dpo.modeling.last_layer import reading
from online_dpo.packing.prefix_tree import PADDING, cut
from online_dpo.rollout.builtin.kv_memory import Memory, our_attention
from online_dpo.rollout.builtin.sampling import next_tokens
from online_dpo.rollout.params import SamplingParams
from online_dpo.types import TokenRows

KINDS = {"full_attention", "sliding_attention"}
PREFILL_TOKENS = {"cpu": 1024}
PREFILL_TOKENS_ELSEWHERE = 16384


def can_decode(model: nn.Module) -> bool:
    """Whether the model is made of attention layers that go through the attention function of `transformers`."""
    if not hands_on_arguments(model):
        return False
    kinds = set(layer_kinds(unwrapped(model).config.get_text_config()))
    return kinds <= KINDS and accepts_argument(model, "position_ids")


class StepwiseDecoder(Protocol):
    """Gives next-token logits of K completions of each prompt, token by token: see `Decoder`."""

    def prefill(self) -> torch.Tensor: ...

    def step(self, token_B: torch.Tensor) -> torch.Tensor: ...

    def keep(self, rows_GK: torch.Tensor) -> None: ...

    def sample(
        self, token_B: torch.Tensor, uniform_B: torch.Tensor, params: SamplingParams, seen_BV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A step, and the token drawn after it: its id and log-probability, both (B,). See `next_tokens`."""
        logits_BV = self.step(token_B)
        return next_tokens(logits_BV, logits_BV, uniform_B, params, seen_BV)

    def rows(self, groups: int, num_completions: int) -> int:
        """Sequences that a step computes for so many completions of each of so many groups."""
        return groups * num_completions


class Decoder(StepwiseDecoder):
    """Prefills prompts, then gives the logits after one more token of each completion at a time.

    Args:
        model: in eval mode; see `can_decode`.
        prompts: token ids; may differ in length.
        num_completions: K.
        max_new_tokens: most places a completion will need.
    """

    def __init__(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], num_completions: int, max_new_tokens: int
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.prompts, self.num_completions = prompts, num_completions
        self.lengths_G = torch.tensor([len(ids) for ids in prompts], device=self.device)
        self._sees_all = len({len(ids) for ids in prompts}) == 1  # of all places that are read
        self.memory = Memory(len(prompts), num_completions, max(map(len, prompts)), max_new_tokens)
        self._base: Any = unwrapped(model)  # once: it takes milliseconds
        self.config: Any = self._base.config.get_text_config()
        self._windows = {kind: window_of(self.config, kind) for kind in set(layer_kinds(self.config))}
        self._logits_alone = logits_alone(model)
        self._last_only = {"logits_to_keep": 1} if accepts_argument(model, "logits_to_keep") else {}

    def prefill(self) -> torch.Tensor:
        """Computes all prompts, the shortest first and as many at a time as keep the pass small; logits after them,
        (G, V).
        """
        budget = PREFILL_TOKENS.get(self.device.type, PREFILL_TOKENS_ELSEWHERE)
        order = sorted(range(len(self.prompts)), key=lambda g: len(self.prompts[g]))
        parts = []
        with our_attention(self.config):
            for chosen in cut(order, [len(ids) for ids in self.prompts], budget):
                self.memory.write_prompts(torch.tensor(chosen, device=self.device))
                parts.append(self._prefill([self.prompts[g] for g in chosen]))
        logits_GV = torch.cat(parts)
        return logits_GV[torch.tensor(order, device=self.device).argsort()]

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        """Logits after one more token of each sequence, (B, V)."""
        self.memory.next_place()
        return self._forward(token_B, self.lengths_G, self.num_completions)

    def keep(self, rows_GK: torch.Tensor) -> None:
        """From now on only these sequences, given by their present numbers, (G', K'); each row those of one group."""
        group_G = rows_GK[:, 0] // self.num_completions
        self.lengths_G = self.lengths_G[group_G]
        self.memory.keep(group_G, rows_GK.flatten())
        self.num_completions = rows_GK.shape[1]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        length = max(map(len, prompts))
        ids = [[0] * (length - len(p)) + list(p) for p in prompts]  # padding on the left: the last place predicts
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
            inputs["attention_mask"] = None  # plain causal attention, which has a faster kernel
        if self._last_only:
            last_G = torch.arange(1, len(prompts) + 1, device=self.device) * length - 1
            inputs |= reading(self._base, last_G)
        output = self.model(input_ids=tokens.ids_RT, use_cache=False, memory=self.memory, **inputs, **self._last_only)
        return output.logits[:, -1]

    def _forward(self, token_B: torch.Tensor, lengths_G: torch.Tensor, num_completions: int) -> torch.Tensor:
        position_B1 = (lengths_G + self.memory.place).repeat_interleave(num_completions)[:, None]
        masks = {kind: self._mask(lengths_G, window, num_completions) for kind, window in self._windows.items()}
        with our_attention(self.config):
            output = self.model(
                input_ids=token_B[:, None],
                position_ids=position_B1,
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                use_cache=False,
                memory=self.memory,
                **self._logits_alone,
            )
        return output.logits[:, -1]

    def _mask(self, lengths_G: torch.Tensor, window: int | None, num_completions: int) -> torch.Tensor | None:
        """What each sequence's next token sees of its prompt's places and of its own, (B, 1, 1, P + C); ``None`` if
        all.
        """
        if window is None and self._sees_all:
            return None
        memory, length_G1 = self.memory, lengths_G[:, None]
        place_P = torch.arange(memory.prompt_places, device=self.device)
        position_GP = place_P - (memory.prompt_places - length_G1)  # prompts end at the last place
        own_C = torch.arange(memory.width, device=self.device)
        position_GX = torch.cat([position_GP, length_G1 + own_C], dim=1)
        now_G1 = length_G1 + memory.place
        seen_GX = (position_GX >= 0) & (position_GX <= now_G1)
        if window is not None:
            seen_GX &= now_G1 - position_GX < window
        return seen_GX.repeat_interleave(num_completions, dim=0)[:, None, None]
