"""Decoding steps with static shapes and addresses, so that a GPU can replay them as CUDA graphs.

A captured graph reads and writes the addresses it was captured with, and its shapes are fixed. So, in difference to
`decoding.py`: the key/value cache has slots for the longest completions from the beginning, and is kept between calls;
the slot of the current token is a tensor on the device, because a Python number would become a constant of the graph;
and counts are rounded up, so that few graphs serve all batches. Padding (sequences and slots that exist only because of
the rounding) is computed and masked out.

Shapes: ``G`` groups, ``K`` completions of each, ``B`` sequences, ``P`` prompt slots, ``C`` completion slots, ``V``
vocabulary; all but the last are rounded up inside a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from online_dpo.modeling.introspection import computing_dtype, forward_state_key
from online_dpo.rollout.builtin.cuda_graphs import StepGraphs
from online_dpo.rollout.builtin.decoding import Decoder
from online_dpo.rollout.builtin.kv_cache import KVCache, KVLayer, attend
from online_dpo.rollout.builtin.linear_copies import LinearCopies
from online_dpo.rollout.builtin.sampling import next_tokens
from online_dpo.rollout.params import SamplingParams

SLOT_MULTIPLE = 64
"""Counts of slots are multiples of this: each other count of completion slots would be a graph of its own."""


def can_be_static(model: nn.Module) -> bool:
    """Whether the model's weights keep their addresses: whole, on one device, neither sharded nor quantised."""
    device = next(model.parameters()).device
    plain = all(type(p) in (torch.Tensor, nn.Parameter) and p.device == device for p in model.parameters())
    return plain and all(p.numel() > 0 for p in model.parameters())  # ZeRO-3 leaves empty ones behind


def rounded_up(count: int, least: int = 1) -> int:
    """``count``, rounded up to a multiple of ``least``, and to one of at most four sizes between two powers of two.

    So few sizes occur, and at most a quarter is added (unless ``least`` adds more).

    >>> [rounded_up(n) for n in (3, 8, 9, 33)], rounded_up(70, 64)
    ([3, 8, 10, 40], 128)
    """
    unit = max(least, _power_of_two(count) // 8)
    return -(-count // unit) * unit


class StaticBuffers:
    """What static steps read and write besides weights, at fixed addresses: the key/value cache, the inputs of a step,
    and the graphs that were captured with them.

    They are used again in later calls, while the optimizer changes the weights in place. More groups or slots than
    before, another state of the model (`forward_state_key`), or copies of its weights at other addresses need new
    buffers and new graphs.
    """

    def __init__(self) -> None:
        self.graphs = StepGraphs()
        self.linears = LinearCopies()
        self.layers: dict[int, KVLayer] = {}
        self._inputs: dict[str, torch.Tensor] = {}
        self._model_state: tuple[Any, ...] = ()
        self._capacity = (0, 0, 0, 0)

    def reserve(self, model: nn.Module, groups: int, sequences: int, prompt_slots: int, slots: int) -> None:
        """Prepares the buffers for a new batch of at most this size. Drops them first, with all graphs, if they are too
        small or the model's state is another.
        """
        model_state = (*forward_state_key(model), computing_dtype(model), self.linears.made)
        capacity = tuple(map(max, zip(self._capacity, (groups, sequences, prompt_slots, slots), strict=True)))
        if model_state != self._model_state or capacity != self._capacity:
            self._release_cache()  # copies of weights stay, unless they are found to be of another state
            self._model_state, self._capacity = model_state, capacity
        # Values of the last batch may be infinite or nan, and masked slots are still multiplied, with a probability of
        # 0. Keys need no reset: the mask replaces the scores that they give.
        for layer in self.layers.values():
            layer.prompt_values.zero_()
            layer.values.zero_()

    def release(self) -> None:
        """Frees all memory; the next step allocates and captures again."""
        self._release_cache()
        self.linears.release()

    def _release_cache(self) -> None:
        self.graphs.release()
        self.layers.clear()
        self._inputs.clear()
        self._capacity = (0, 0, 0, 0)

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> KVLayer:
        """The cache layer with this index, at full capacity; allocated at its first use, like ``key`` and ``value``."""
        if index not in self.layers:
            groups, sequences, prompt_slots, slots = self._capacity
            self.layers[index] = KVLayer.like(key, value, groups, prompt_slots, sequences, slots)
        return self.layers[index]

    def input(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The input buffer with this name, with one row for each sequence of the capacity."""
        if name not in self._inputs:
            self._inputs[name] = like.new_zeros(self._capacity[1], *like.shape[1:])
        return self._inputs[name]


@dataclass
class StaticKVLayer:
    """One layer of the cache in a step, and the slot of the current token, (1,).

    In difference to the whole cache it holds tensors only: code that was compiled for one layer serves all.
    """

    layer: KVLayer
    slot: torch.Tensor

    def write(self, key: torch.Tensor, value: torch.Tensor) -> KVLayer:
        """Writes the key and value of the current token of each completion; returns all that queries read."""
        layer = self.layer
        layer.keys.index_copy_(2, self.slot, key.to(layer.keys.dtype))
        layer.values.index_copy_(2, self.slot, value.to(layer.values.dtype))
        return layer

    def write_and_attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden: torch.Tensor | None,
        scaling: float,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Writes the key and value, and returns the attention output, (B, 1, heads, D)."""
        return attend(query, self.write(key, value), hidden, scaling, options)


class StaticKVCache(KVCache):
    """The part of the buffers that the current batch uses.

    ``groups``, ``sequences``, ``prompt_slots`` and ``width`` are rounded up; ``slot`` is a tensor on the device, (1,).
    """

    def __init__(
        self, buffers: StaticBuffers, slot_1: torch.Tensor, groups: int, k: int, prompt_slots: int, slots: int
    ) -> None:
        super().__init__(groups, k, prompt_slots, slots)
        self.buffers = buffers
        self.slot = slot_1
        self.written = 0  # completion slots in use, that of the current token included

    @property
    def width(self) -> int:
        """The number of completion slots that queries read, rounded up; those not yet written are masked out."""
        return rounded_up(self.written, SLOT_MULTIPLE)

    def advance(self) -> None:
        """Starts a decoding step; the next slot is written into the tensor that graphs read it from."""
        self._prompt_group_X = None
        self.slot.fill_(self.written)
        self.written += 1

    def prompt_layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> KVLayer:
        """The current batch's part of the layer with this index."""
        return self._view(self.buffers.layer(index, key, value))

    def write(self, index: int, key: torch.Tensor, value: torch.Tensor) -> KVLayer:
        """Writes the key and value of the current token of each completion; returns views of all that queries read.

        The slot is an index on the device, so one graph serves every step of the same width.
        """
        return self.step_layer(index).write(key, value)

    def step_layer(self, index: int) -> StaticKVLayer:
        """The current batch's part of one layer, for a step."""
        return StaticKVLayer(self._view(self.buffers.layers[index]), self.slot)

    def move(self, group_G: torch.Tensor, source_B: torch.Tensor, target_B: torch.Tensor) -> None:
        """Moves these groups to the front, and sequences ``source_B`` to rows ``target_B``, within the same buffers."""
        for layer in self.buffers.layers.values():
            for prompts in (layer.prompt_keys, layer.prompt_values):
                prompts[: len(group_G)] = prompts[group_G]
            for completions in (layer.keys, layer.values):
                completions[target_B, :, : self.width] = completions[source_B, :, : self.width]

    def _view(self, layer: KVLayer) -> KVLayer:
        first = layer.prompt_keys.shape[2] - self.prompt_slots  # prompts end in the last slot of the buffer
        return KVLayer(
            layer.prompt_keys[: self.groups, :, first:],
            layer.prompt_values[: self.groups, :, first:],
            layer.keys[: self.sequences, :, : self.width],
            layer.values[: self.sequences, :, : self.width],
        )


class StaticDecoder(Decoder):
    """A `Decoder` whose steps are captured once and replayed. The tensors a step returns are valid until the next step.

    Sequence k of group g has row ``g * K + k`` outside, and the same with K rounded up inside.

    Raises:
        NotCapturableError: in the first step, if the model does something in it that no CUDA graph can.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        num_completions: int,
        max_new_tokens: int,
        buffers: StaticBuffers,
    ) -> None:
        super().__init__(model, prompts, num_completions, max_new_tokens)
        self.buffers = buffers
        self.num_groups = len(prompts)
        self._initial = (rounded_up(len(prompts)), rounded_up(num_completions))
        self._padded = self._initial
        self._needs_no_mask = False  # slots are rounded up, so some must always be masked
        prompt_slots = rounded_up(max(map(len, prompts)), SLOT_MULTIPLE)
        slots = rounded_up(max_new_tokens, SLOT_MULTIPLE)
        groups, k = self._initial
        buffers.reserve(model, groups, groups * k, prompt_slots, slots)
        lengths_G = self.lengths_G
        self.lengths_G = buffers.input("lengths", lengths_G).zero_()
        self.lengths_G[: self.num_groups] = lengths_G
        slot_1 = buffers.input("slot", lengths_G)[:1]
        self.kv_cache: StaticKVCache = StaticKVCache(buffers, slot_1, groups, k, prompt_slots, slots)

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        """Appends one token to each sequence; returns the logits after it, (B, V)."""
        token_B = self._begin_step(token_B)
        return self._unpadded(self._run("logits", lambda: self._logits(token_B)))

    def sample(
        self, token_B: torch.Tensor, uniform_B: torch.Tensor, params: SamplingParams, seen_BV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends one token to each sequence and draws the next in the same graph: ids and log-probabilities, (B,)."""
        token_B = self._begin_step(token_B)
        uniform_B = self._fill_input("uniform", uniform_B)
        seen_BV = None if seen_BV is None else self._fill_input("seen", seen_BV)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            logits_BV = self._logits(token_B)
            return next_tokens(logits_BV, logits_BV, uniform_B, params, seen_BV)

        # These options are constants of the captured graph, so each combination is a graph of its own.
        reshaping = (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty)
        token_B, logps_B = self._run(reshaping, run)
        return self._unpadded(token_B), self._unpadded(logps_B)

    def keep_only(self, rows_GK: torch.Tensor) -> None:
        """Drops all sequences but these, given by their present indices, (G', K'), by moving them to the front."""
        groups, k = rows_GK.shape
        group_G, padded_k = rows_GK[:, 0] // self.num_completions, self._padded[1]
        source_GK = group_G[:, None] * padded_k + rows_GK % self.num_completions
        self.num_groups, self.num_completions = groups, k
        self._padded = self._rounded(groups, k)
        group_numbers_G = torch.arange(groups, device=self.device)
        target_GK = group_numbers_G[:, None] * self._padded[1] + torch.arange(k, device=self.device)
        self.kv_cache.move(group_G, source_GK.flatten(), target_GK.flatten())
        self.kv_cache.groups, self.kv_cache.sequences = self._padded[0], self._padded[0] * self._padded[1]
        self.lengths_G[:groups] = self.lengths_G[group_G]

    def rows(self, groups: int, num_completions: int) -> int:
        """The number of sequences that a step computes for this many groups and completions, padding included."""
        groups, num_completions = self._rounded(groups, num_completions)
        return groups * num_completions

    def _rounded(self, groups: int, num_completions: int) -> tuple[int, int]:
        """Both counts as powers of two, or as at the start where that is less: then few graphs serve all steps."""
        initial_groups, initial_k = self._initial
        return min(_power_of_two(groups), initial_groups), min(_power_of_two(num_completions), initial_k)

    def _begin_step(self, token_B: torch.Tensor) -> torch.Tensor:
        """Advances the cache by a slot; returns the input buffer of tokens, filled."""
        self.kv_cache.advance()
        return self._fill_input("token", token_B)

    def _run(self, computation: Any, step: Callable[[], Any]) -> Any:
        """Runs a step; the key of its graph is what it computes, and every shape it computes it with."""
        kv_cache = self.kv_cache
        key = (computation, *self._padded, kv_cache.prompt_slots, kv_cache.width)
        return self.buffers.graphs.run(key, step, self.device)

    def _logits(self, token_B: torch.Tensor) -> torch.Tensor:
        return self._forward(token_B, self.lengths_G[: self._padded[0]], self._padded[1])

    def _fill_input(self, name: str, x_B: torch.Tensor) -> torch.Tensor:
        """The input buffer with this name for all rows, after ``x_B`` was copied to the rows of real sequences."""
        groups, k = self._padded
        rows = self.buffers.input(name, x_B)[: groups * k]
        rows.unflatten(0, (groups, k))[: self.num_groups, : self.num_completions] = x_B.unflatten(
            0, (self.num_groups, self.num_completions)
        )
        return rows

    def _unpadded(self, x_B: torch.Tensor) -> torch.Tensor:
        """The rows of real sequences, out of those for all rows."""
        x_GK = x_B.unflatten(0, self._padded)
        return x_GK[: self.num_groups, : self.num_completions].flatten(0, 1)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()
