"""Decoding steps whose shapes and addresses stay the same, so that a GPU can replay them as CUDA graphs.

The same contract, memory and attention as `decoding.py`, but: the memory has room for the longest completions from the
beginning and stays from call to call; where the present token is written is a number on the device; and counts are
rounded up, so that few different steps exist. Sequences and places beyond the real ones are computed and masked out.

Shapes: ``G`` groups, ``K`` completions of each, ``B`` sequences, ``P`` places of prompts, ``C`` places of completions,
``V`` vocabulary; all of them rounded up inside a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from online_dpo.modeling.introspection import computing_dtype, state_of_forward
from online_dpo.rollout.builtin.cast_linears import CastLinears
from online_dpo.rollout.builtin.cuda_graphs import StepGraphs
from online_dpo.rollout.builtin.decoding import Decoder
from online_dpo.rollout.builtin.kv_memory import Layer, Memory
from online_dpo.rollout.builtin.sampling import next_tokens
from online_dpo.rollout.params import SamplingParams

LEAST_PLACES = 64


def can_be_static(model: nn.Module) -> bool:
    """Whether the model's weights stay where they are: whole, on one device, neither sharded nor quantised."""
    device = next(model.parameters()).device
    plain = all(type(p) in (torch.Tensor, nn.Parameter) and p.device == device for p in model.parameters())
    return plain and all(p.numel() > 0 for p in model.parameters())  # ZeRO-3 leaves empty ones behind


def rounded_up(count: int, least: int = 1) -> int:
    """``count`` or a little more: a multiple of ``least``, and of large ones only four sizes for each doubling, so at
    most a quarter more.

    >>> [rounded_up(n) for n in (3, 8, 9, 33)], rounded_up(70, 64)
    ([3, 8, 10, 40], 128)
    """
    unit = max(least, _power_of_two(count) // 8)
    return -(-count // unit) * unit


class StaticBuffers:
    """All that static steps read and write but weights, at addresses that stay: the memory of keys and values, the
    inputs of a step, and the graphs that were captured with them.

    They serve call after call, while the model's weights change in place. Steps for more, or by another way through
    the model, begin with new ones.
    """

    def __init__(self) -> None:
        self.graphs = StepGraphs()
        self.linears = CastLinears()
        self.layers: dict[int, Layer] = {}
        self._inputs: dict[str, torch.Tensor] = {}
        self._made_for: tuple[Any, ...] = ()
        self._room = (0, 0, 0, 0)

    def fit(self, model: nn.Module, groups: int, sequences: int, prompt_places: int, places: int) -> None:
        """Makes room for as much, for this model; nothing that was in the memory counts any more."""
        made_for = (*state_of_forward(model), computing_dtype(model))
        room = tuple(map(max, zip(self._room, (groups, sequences, prompt_places, places), strict=True)))
        if made_for != self._made_for or room != self._room:
            self.release()
            self._made_for, self._room = made_for, room
        for layer in self.layers.values():  # what is masked out is still multiplied with 0, and may not be infinite
            layer.prompt_values.zero_()
            layer.values.zero_()

    def release(self) -> None:
        """Give all memory back; the next step begins anew."""
        self.graphs.release()
        self.linears.release()
        self.layers.clear()
        self._inputs.clear()
        self._room = (0, 0, 0, 0)

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> Layer:
        if index not in self.layers:
            groups, sequences, prompt_places, places = self._room
            self.layers[index] = Layer.like(key, value, groups, prompt_places, sequences, places)
        return self.layers[index]

    def input(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The input of this name, with a row for each sequence there may be."""
        if name not in self._inputs:
            self._inputs[name] = like.new_zeros(self._room[1], *like.shape[1:])
        return self._inputs[name]


class StaticMemory(Memory):
    """The part of the buffers that present sequences use: ``groups``, ``sequences``, ``prompt_places`` and ``width``
    are rounded up, ``place`` is a number on the device.
    """

    def __init__(
        self, buffers: StaticBuffers, place_1: torch.Tensor, groups: int, k: int, prompt_places: int, places: int
    ) -> None:
        super().__init__(groups, k, prompt_places, places)
        self.buffers = buffers
        self.place = place_1
        self.written = 0  # places of completions, the present one among them

    @property
    def width(self) -> int:
        return rounded_up(self.written, LEAST_PLACES)

    def next_place(self) -> None:
        self._group_X = None
        self.place.fill_(self.written)
        self.written += 1

    def prompts_of(self, index: int, key: torch.Tensor, value: torch.Tensor) -> Layer:
        return self._view(self.buffers.layer(index, key, value))

    def write(self, index: int, key: torch.Tensor, value: torch.Tensor) -> Layer:
        layer = self._view(self.buffers.layers[index])
        layer.keys.index_copy_(2, self.place, key.to(layer.keys.dtype))
        layer.values.index_copy_(2, self.place, value.to(layer.values.dtype))
        return layer

    def move(self, group_G: torch.Tensor, source_B: torch.Tensor, target_B: torch.Tensor) -> None:
        """These groups become the first ones, and sequences ``source_B`` those at ``target_B``."""
        for layer in self.buffers.layers.values():
            for prompts in (layer.prompt_keys, layer.prompt_values):
                prompts[: len(group_G)] = prompts[group_G]
            for own in (layer.keys, layer.values):
                own[target_B, :, : self.width] = own[source_B, :, : self.width]

    def _view(self, layer: Layer) -> Layer:
        first = layer.prompt_keys.shape[2] - self.prompt_places
        return Layer(
            layer.prompt_keys[: self.groups, :, first:],
            layer.prompt_values[: self.groups, :, first:],
            layer.keys[: self.sequences, :, : self.width],
            layer.values[: self.sequences, :, : self.width],
        )


class StaticDecoder(Decoder):
    """A `Decoder` whose steps are replayed. What a step returns holds until the next one.

    Sequence k of group g has row ``g * K + k`` outside, and the same with the rounded K inside.

    Raises:
        NotCapturableError: in the first step, if the model does in it what no graph can.
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
        self._first = (rounded_up(len(prompts)), rounded_up(num_completions))
        self._padded = self._first
        self._sees_all = False  # places are rounded up
        prompt_places = rounded_up(max(map(len, prompts)), LEAST_PLACES)
        places = rounded_up(max_new_tokens, LEAST_PLACES)
        groups, k = self._first
        buffers.fit(model, groups, groups * k, prompt_places, places)
        lengths_G = self.lengths_G
        self.lengths_G = buffers.input("lengths", lengths_G).zero_()
        self.lengths_G[: self.num_groups] = lengths_G
        place_1 = buffers.input("place", lengths_G)[:1]
        self.memory: StaticMemory = StaticMemory(buffers, place_1, groups, k, prompt_places, places)

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        token_B = self._begin(token_B)
        return self._real(self._run("logits", lambda: self._logits(token_B)))

    def sample(
        self, token_B: torch.Tensor, uniform_B: torch.Tensor, params: SamplingParams, seen_BV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        token_B = self._begin(token_B)
        uniform_B = self._put("uniform", uniform_B)
        seen_BV = None if seen_BV is None else self._put("seen", seen_BV)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            logits_BV = self._logits(token_B)
            return next_tokens(logits_BV, logits_BV, uniform_B, params, seen_BV)

        reshaping = (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty)
        token_B, logps_B = self._run(reshaping, run)
        return self._real(token_B), self._real(logps_B)

    def keep(self, rows_GK: torch.Tensor) -> None:
        groups, k = rows_GK.shape
        group_G, padded_k = rows_GK[:, 0] // self.num_completions, self._padded[1]
        source_GK = group_G[:, None] * padded_k + rows_GK % self.num_completions
        self.num_groups, self.num_completions = groups, k
        self._padded = self._rounded(groups, k)
        group_numbers_G = torch.arange(groups, device=self.device)
        target_GK = group_numbers_G[:, None] * self._padded[1] + torch.arange(k, device=self.device)
        self.memory.move(group_G, source_GK.flatten(), target_GK.flatten())
        self.memory.groups, self.memory.sequences = self._padded[0], self._padded[0] * self._padded[1]
        self.lengths_G[:groups] = self.lengths_G[group_G]

    def rows(self, groups: int, num_completions: int) -> int:
        groups, num_completions = self._rounded(groups, num_completions)
        return groups * num_completions

    def _rounded(self, groups: int, num_completions: int) -> tuple[int, int]:
        """What is computed for so many: powers of two below what it began with, so that steps are often the same."""
        first_groups, first_k = self._first
        return min(_power_of_two(groups), first_groups), min(_power_of_two(num_completions), first_k)

    def _begin(self, token_B: torch.Tensor) -> torch.Tensor:
        self.memory.next_place()
        return self._put("token", token_B)

    def _run(self, what: Any, step: Callable[[], Any]) -> Any:
        memory = self.memory
        return self.buffers.graphs.run((what, *self._padded, memory.prompt_places, memory.width), step, self.device)

    def _logits(self, token_B: torch.Tensor) -> torch.Tensor:
        return self._forward(token_B, self.lengths_G[: self._padded[0]], self._padded[1])

    def _put(self, name: str, x_B: torch.Tensor) -> torch.Tensor:
        """The input of this name for all rows, with ``x_B`` in the rows of real sequences."""
        groups, k = self._padded
        rows = self.buffers.input(name, x_B)[: groups * k]
        rows.unflatten(0, (groups, k))[: self.num_groups, : self.num_completions] = x_B.unflatten(
            0, (self.num_groups, self.num_completions)
        )
        return rows

    def _real(self, x_B: torch.Tensor) -> torch.Tensor:
        """Of results for all rows those of real sequences."""
        x_GK = x_B.unflatten(0, self._padded)
        return x_GK[: self.num_groups, : self.num_completions].flatten(0, 1)


def _power_of_two(count: int) -> int:
    """The least power of two that is not below ``count``."""
    return 1 << (count - 1).bit_length()
