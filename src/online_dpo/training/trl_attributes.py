"""Attributes of TRL's ``OnlineDPOTrainer``, for scripts and callbacks that were written for it.

They are read-only: engine and scorers are built once, from the configuration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from online_dpo.modeling.reference import FrozenReference, Reference, SyncedReference
from online_dpo.objective.beta import Beta
from online_dpo.rollout.params import SamplingParams
from online_dpo.scoring.protocols import PointwiseScorer
from online_dpo.scoring.rewards.combine import unique_names
from online_dpo.scoring.rewards.function import FunctionScorer
from online_dpo.scoring.rewards.model import RewardModelScorer
from online_dpo.training.metric_store import MetricStore
from online_dpo.types import Feedback, Verdicts


class FromConfig:
    """A descriptor that reads a field of the configuration, by default the one with the attribute's name."""

    def __init__(self, name: str | None = None) -> None:
        self._name = name

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = self._name or name

    def __get__(self, trainer: Any, owner: type) -> Any:
        if trainer is None:
            return self
        assert self._name is not None
        return getattr(trainer.args, self._name)


class TRLAttributes:
    """The attributes of TRL's trainer. The attributes of `FeedbackTrainer` that they use are declared first."""

    args: Any
    state: Any
    tokenizer: PreTrainedTokenizerBase
    scorers: list[PointwiseScorer]
    reference: Reference
    sampling: SamplingParams
    adaptive_beta: Beta
    metrics: MetricStore
    last_feedback: Feedback | None

    num_generations = FromConfig("num_completions")
    max_length = FromConfig()
    temperature = FromConfig()
    top_p = FromConfig()
    top_k = FromConfig()
    min_p = FromConfig()
    repetition_penalty = FromConfig()
    use_vllm = FromConfig()
    vllm_gpu_memory_utilization = FromConfig()
    vllm_tensor_parallel_size = FromConfig()
    vllm_model_impl = FromConfig()
    is_encoder_decoder = False
    is_vision_model = False

    @property
    def vllm_mode(self) -> str | None:
        """The mode of vLLM, ``None`` if vLLM is not used."""
        return self.args.vllm_mode if self.args.use_vllm else None

    @property
    def reward_funcs(self) -> list[Any]:
        """The reward functions and loaded reward models, in order; empty if only a judge compares."""
        return [_reward(scorer) for scorer in self.scorers]

    @property
    def reward_func_names(self) -> list[str]:
        """The names of the rewards in metrics."""
        return unique_names(self.scorers)

    @property
    def reward_processing_classes(self) -> list[PreTrainedTokenizerBase | None]:
        """The tokenizer of each reward model, ``None`` for other rewards."""
        return [scorer.tokenizer if isinstance(scorer, RewardModelScorer) else None for scorer in self.scorers]

    @property
    def reward_weights(self) -> torch.Tensor:
        """The weight of each reward, 1 by default."""
        weights = self.args.reward_weights
        return torch.ones(len(self.scorers)) if weights is None else torch.tensor(weights, dtype=torch.float32)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model; ``None`` if it is the policy without its adapter, or if there is none."""
        reference = self.reference
        return reference.model if isinstance(reference, (FrozenReference, SyncedReference)) else None

    @property
    def beta(self) -> float:
        """The current value of beta."""
        return self.adaptive_beta.at(self.state.epoch or 0.0)

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids of all tokens that end a completion."""
        return list(self.sampling.end_token_ids)

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        """The sampling parameters as arguments of `transformers.GenerationConfig`."""
        sampling = self.sampling
        given = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": True,
            "pad_token_id": self.tokenizer.pad_token_id,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": list(sampling.end_token_ids),
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "use_cache": True,
            "stop_strings": list(sampling.stop_strings) or None,
            **sampling.extra,
        }
        return {name: value for name, value in given.items() if value is not None}

    @property
    def generation_config(self) -> GenerationConfig:
        """The sampling parameters as a config for ``generate`` or for TRL's callbacks."""
        return GenerationConfig(**self.generation_kwargs)

    @property
    def stats(self) -> dict[str, list[float]]:
        """For each metric since the last log, a list with its mean on this process."""
        return {name: [value] for name, value in self.metrics.means().items()}

    @property
    def completions(self) -> dict[str, list[Any]]:
        """The latest step's completions on this process as a table with one row each, as TRL's GRPO logs them.

        The columns are ``prompt``, ``completion``, one for each reward, and those that reward functions passed to
        ``log_extra``.
        """
        feedback = self.last_feedback
        if feedback is None:
            return {}
        rows = [(group.prompt, completion) for group in feedback.groups for completion in group.completions]
        scores = feedback.said.scores if isinstance(feedback.said, Verdicts) else feedback.said
        by_scorer = {} if scores is None else scores.by_scorer
        return {
            "prompt": [prompt.content for prompt, _ in rows],
            "completion": [completion.text for _, completion in rows],
            **{name: [value for row in values for value in row] for name, values in by_scorer.items()},
            **({} if feedback.notes is None else feedback.notes.columns),
        }


def _reward(scorer: PointwiseScorer) -> Any:
    if isinstance(scorer, FunctionScorer):
        return scorer.function
    return scorer.model if isinstance(scorer, RewardModelScorer) else scorer
