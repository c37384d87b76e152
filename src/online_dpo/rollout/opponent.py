"""Opponents: where the completions come from with which the policy's are compared."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Protocol

from online_dpo.modeling.borrowing import ModelContext
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.types import Author, Completion, Group, Prompt


class Opponent(Protocol):
    """Adds ``completions`` completions to each prompt's group.

    It may run the model that is trained, so `answer` must be called in the thread that trains it.
    """

    completions: int

    def answer(self, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey) -> list[Group]:
        """Samples the opponent's completions; returns one group for each prompt, in order."""
        ...

    def release(self) -> None:
        """Frees memory that is kept between calls."""
        ...


class SelfPlay:
    """The policy's completions are compared with each other."""

    completions = 0

    def answer(self, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey) -> list[Group]:
        """Groups without completions: there is no opponent besides the policy."""
        return [Group(prompt, ()) for prompt in prompts]

    def release(self) -> None:
        """Does nothing: no memory is kept."""


class ModelOpponent:
    """An opponent that samples one completion for each prompt from another model.

    Args:
        engine: samples from that model.
        author: the ``author`` of its completions.
        model_context: inside it, the engine's model is the opponent; by default it always is.
    """

    completions = 1

    def __init__(self, engine: TransformersEngine, author: Author, model_context: ModelContext | None = None) -> None:
        self._engine, self._author, self._model_context = engine, author, model_context or nullcontext

    def answer(self, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey) -> list[Group]:
        """Samples one completion for each prompt, with this opponent as its author."""
        with self._model_context():
            groups = self._engine.generate(prompts, self.completions, params, key)
        return [replace(group, completions=tuple(map(self._signed, group.completions))) for group in groups]

    def release(self) -> None:
        """Frees memory that the engine keeps between calls."""
        self._engine.release()

    def _signed(self, completion: Completion) -> Completion:
        return replace(completion, author=self._author)


def joined(policy_groups: Sequence[Group], opponent_groups: Sequence[Group]) -> list[Group]:
    """Groups that have the completions of both lists of groups, which are of the same prompts: the policy's first."""
    return [
        replace(group, completions=group.completions + other.completions)
        for group, other in zip(policy_groups, opponent_groups, strict=True)
    ]
