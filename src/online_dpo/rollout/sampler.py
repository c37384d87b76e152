"""The sampler of training and evaluation: an engine, its options, and the checks around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from online_dpo.distributed.device_memory import Kept
from online_dpo.distributed.sampling import whole_on
from online_dpo.errors import ForeignCodeError
from online_dpo.foreign import foreign
from online_dpo.modeling.known_tokens import VocabularyCheck
from online_dpo.modeling.precision import without_autocast
from online_dpo.rollout.engine import Engine
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.sync_check import SyncCheck
from online_dpo.runs import events
from online_dpo.types import Group, Prompt


class Sampler:
    """Samples the policy's completions through an engine, after the weights have been synchronised.

    Args:
        policy: the model whose weights the engine takes.
        engine: samples the completions.
        params: the sampling options.
        vocabulary: checks that every model which reads the tokens has embeddings for them.
        sync_check: compares the engine's log-probabilities with the policy's.
        seed: returns the seed of the run.
        autocast: the context of mixed precision in which models compute.
    """

    def __init__(
        self,
        policy: nn.Module,
        engine: Engine,
        params: SamplingParams,
        vocabulary: VocabularyCheck,
        sync_check: SyncCheck,
        seed: Callable[[], int],
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.policy, self.engine, self.params = policy, engine, params
        self.vocabulary, self.sync_check = vocabulary, sync_check
        self._seed, self.autocast = seed, autocast
        self._kept = Kept(engine.release)

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self._seed()

    def reading(self, policy: nn.Module) -> AbstractContextManager[None]:
        """Around several calls of `sample`: an engine that samples from the policy itself finds it whole. One with its
        own weights does not read it, and whole weights would be in its way.
        """
        return nullcontext() if self.engine.has_own_weights else whole_on(self.sync_check.device, policy)

    def sync(self, prompts: Sequence[Prompt], step: int, version: int) -> None:
        """Sends the policy's weights to the engine, and checks at intervals that it samples with them.

        Args:
            prompts: the prompts of this step, for the check.
            step: the number of optimizer steps behind the weights.
            version: the version of the weights. It differs from ``step`` if an optimizer evaluates other weights than
                it trains.

        Raises:
            OutOfSyncError: the engine's log-probabilities differ from the policy's by more than rounding.
        """
        started = time.perf_counter()
        with without_autocast():  # an adapter is merged in the dtype of the weights, and loaders know their own dtypes
            self.engine.sync(self.policy, version)
        if self.engine.has_own_weights:
            seconds = time.perf_counter() - started
            events.emit("sync", f"The engine has the weights of step {step}.", version=version, seconds=seconds)
        if self.engine.has_own_weights and self.sync_check.due(step):
            with self.autocast():
                self.sync_check.check(self.engine, self.policy, prompts, self.params, self.seed, step)

    def sample(self, prompts: Sequence[Prompt], count: int, key: RolloutKey) -> list[Group]:
        """Returns ``count`` completions of each prompt, sampled with the weights of the last `sync`. An engine that
        calls the policy does so in the trainer's mixed precision, one with weights of its own in its own dtypes.
        """
        who = f"Engine `{type(self.engine).__name__}`"
        precision = without_autocast() if self.engine.has_own_weights else self.autocast()
        with self._kept.in_use(), precision, foreign(who, raises=ForeignCodeError):
            return self.engine.generate(prompts, count, self.params, key)

    def release(self) -> None:
        """Frees memory that the engine keeps between calls."""
        self.engine.release()
