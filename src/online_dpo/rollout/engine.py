"""What every engine that samples completions promises to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.types import Group, Prompt


class Engine(Protocol):
    """Samples K completions for each prompt, in the order of the prompts, with the weights of the last `sync`.

    ``has_own_weights``: they are a copy, so that it has to be checked that they are the model's. ``overlaps``:
    `generate` may run in another thread while the model is trained. ``own_dtype``: what it computes in, where that is
    not what the model computes in.
    """

    has_own_weights: bool
    overlaps: bool
    own_dtype: torch.dtype | None

    def sync(self, model: nn.Module, version: int) -> None:
        """Sample with these weights from now on, and stamp completions with this policy version. Where there are
        several processes, all of them call it together.
        """
        ...

    def generate(
        self, prompts: Sequence[Prompt], num_completions: int, params: SamplingParams, key: RolloutKey
    ) -> list[Group]:
        """K completions for each prompt. A token's log-probability is that of the model's own distribution, before
        temperature and the like. Where there are several processes, all of them call it equally often, with no prompts
        where a process has none.
        """
        ...

    def release(self) -> None:
        """Give back memory of the device that `generate` keeps for its next call, and will take again then."""
        ...

    def close(self) -> None:
        """Release what the engine holds: memory, processes, connections."""
        ...
