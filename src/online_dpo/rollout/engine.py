"""The protocol of engines, which sample completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.types import Group, Prompt


class Engine(Protocol):
    """Samples K completions for each prompt, with the weights of the last `sync`.

    ``has_own_weights``: the engine holds a copy of the weights, which must be checked against the model's.
    ``overlaps``: `generate` may run in another thread while the model is trained. ``own_dtype``: the dtype in which the
    engine computes; ``None`` if it is always the model's.
    """

    has_own_weights: bool
    overlaps: bool
    own_dtype: torch.dtype | None

    def sync(self, model: nn.Module, version: int) -> None:
        """Sets the weights, and the policy version that later completions get. With several processes, all of them must
        call it together.
        """
        ...

    def generate(
        self, prompts: Sequence[Prompt], num_completions: int, params: SamplingParams, key: RolloutKey
    ) -> list[Group]:
        """Samples K completions for each prompt; returns the groups in the prompts' order.

        A token's log-probability is under the model's own distribution, before temperature and other sampling options.
        With several processes, all of them must call it the same number of times, also with an empty list of prompts.
        """
        ...

    def release(self) -> None:
        """Frees device memory that `generate` keeps for its next call; that call allocates it again."""
        ...

    def close(self) -> None:
        """Frees what the engine holds: memory, processes, connections. It cannot be used afterwards."""
        ...
