"""Whose completion the policy's is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Protocol

from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.builtin.mixture import ModelContext
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.types import Author, Completion, Group, Prompt


class Opponent(Protocol):
    """Adds ``completions`` answers to each prompt's group.

    It may run the models that are trained, so it answers in the thread that trains them.
    """

    completions: int

    def answer(self, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey) -> list[Group]: ...

    def release(self) -> None:
        """Give back memory that is kept between calls."""
        ...


class SelfPlay:
    """The policy's completions are compared with each other."""

    completions = 0

    def answer(self, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey) -> list[Group]:
        return [Group(prompt, ()) for prompt in prompts]

    def release(self) -> None:
        """There is none."""


class ModelOpponent:
    """Another model answers once.

    Args:
        engine: samples from it, while ``lend`` lends it.
        author: what its completions are signed with.
    """

    completions = 1

    def __init__(self, engine: TransformersEngine, author: Author, model_context: ModelContext | None = None) -> None:
        self._engine, self._author, self._lend = engine, author, model_context or nullcontext

    def answer(self, prompts: Sequence[Prompt], params: SamplingParams, key: RolloutKey) -> list[Group]:
        with self._lend():
            groups = self._engine.generate(prompts, self.completions, params, key)
        return [replace(group, completions=tuple(map(self._signed, group.completions))) for group in groups]

    def release(self) -> None:
        self._engine.release()

    def _signed(self, completion: Completion) -> Completion:
        return replace(completion, author=self._author)


def joined(own: Sequence[Group], theirs: Sequence[Group]) -> list[Group]:
    """The groups of the same prompts as one: the policy's completions first."""
    return [
        replace(group, completions=group.completions + other.completions)
        for group, other in zip(own, theirs, strict=True)
    ]
