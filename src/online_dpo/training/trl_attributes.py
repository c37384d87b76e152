"""Attributes of TRL's ``OnlineDPOTrainer``, for scripts and callbacks that were written for it.

They are read-only: engine and scorers are built once, from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from online_dpo.modeling.reference import FrozenReference, Reference, SyncedReference
from online_dpo.objective.beta import Beta
from online_dpo.rollout.sampler import Sampler
from online_dpo.scoring.protocols import PointwiseScorer
from online_dpo.scoring.rewards.combine import unique_names
from online_dpo.scoring.rewards.function import FunctionScorer
from online_dpo.scoring.rewards.model import RewardModelScorer
from online_dpo.training.metric_store import MetricStore
from online_dpo.types import Feedback, Verdicts

FIELDS = {
    "num_generations": "num_completions",
    "max_length": "max_length",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "use_vllm": "use_vllm",
    "vllm_gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "vllm_tensor_parallel_size": "vllm_tensor_parallel_size",
    "vllm_model_impl": "vllm_model_impl",
}
"""Attributes of TRL's trainer that are fields of the configuration, and the names of these fields."""


class StagesOfTrainer(Protocol):
    """The parts of a trainer that the attributes are read from."""

    args: Any
    state: Any
    tokenizer: PreTrainedTokenizerBase
    scorers: list[PointwiseScorer]
    reference: Reference
    sampler: Sampler
    adaptive_beta: Beta
    metrics: MetricStore

    @property
    def last_feedback(self) -> Feedback | None:
        """What became of the prompts of the step that is trained on."""
        ...


Class = TypeVar("Class", bound=type)
Read = Callable[["StagesOfTrainer"], Any]

ATTRIBUTES: dict[str, Read] = {}
"""All other attributes, and the functions that read them from a trainer."""


def attribute(read: Read) -> Read:
    """Register a function that reads the attribute with the function's name from a trainer."""
    ATTRIBUTES[read.__name__] = read
    return read


def with_trl_attributes(cls: Class) -> Class:
    """Add the attributes of TRL's trainer to a trainer class, as properties."""
    for name, field in FIELDS.items():
        setattr(cls, name, property(_reader(field)))
    for name, read in ATTRIBUTES.items():
        setattr(cls, name, property(read))
    return cls


def _reader(field: str) -> Read:
    return lambda trainer: getattr(trainer.args, field)


@attribute
def vllm_mode(trainer: StagesOfTrainer) -> str | None:
    """The mode of vLLM, ``None`` if vLLM is not used."""
    return trainer.args.vllm_mode if trainer.args.use_vllm else None


@attribute
def reward_funcs(trainer: StagesOfTrainer) -> list[Any]:
    """The reward functions and loaded reward models, in order; empty if only a judge compares."""
    return [_reward(scorer) for scorer in trainer.scorers]


@attribute
def reward_func_names(trainer: StagesOfTrainer) -> list[str]:
    """The names of the rewards in metrics."""
    return unique_names(trainer.scorers)


@attribute
def reward_processing_classes(trainer: StagesOfTrainer) -> list[PreTrainedTokenizerBase | None]:
    """The tokenizer of each reward model, ``None`` for other rewards."""
    return [scorer.tokenizer if isinstance(scorer, RewardModelScorer) else None for scorer in trainer.scorers]


@attribute
def reward_weights(trainer: StagesOfTrainer) -> torch.Tensor:
    """The weight of each reward, 1 by default."""
    weights = trainer.args.reward_weights
    return torch.ones(len(trainer.scorers)) if weights is None else torch.tensor(weights, dtype=torch.float32)


@attribute
def ref_model(trainer: StagesOfTrainer) -> nn.Module | None:
    """The reference model; ``None`` if it is the policy without its adapter, or if there is none."""
    reference = trainer.reference
    return reference.model if isinstance(reference, (FrozenReference, SyncedReference)) else None


@attribute
def beta(trainer: StagesOfTrainer) -> float:
    """The current value of beta."""
    return trainer.adaptive_beta.at(trainer.state.epoch or 0.0)


@attribute
def eos_token_ids(trainer: StagesOfTrainer) -> list[int]:
    """The ids of all tokens that end a completion."""
    return list(trainer.sampler.params.end_token_ids)


@attribute
def generation_kwargs(trainer: StagesOfTrainer) -> dict[str, Any]:
    """The sampling parameters as arguments of `transformers.GenerationConfig`."""
    sampling = trainer.sampler.params
    given = {
        "max_new_tokens": sampling.max_new_tokens,
        "do_sample": True,
        "pad_token_id": trainer.tokenizer.pad_token_id,
        "bos_token_id": trainer.tokenizer.bos_token_id,
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


@attribute
def generation_config(trainer: StagesOfTrainer) -> GenerationConfig:
    """The sampling parameters as a config for ``generate`` or for TRL's callbacks."""
    return GenerationConfig(**generation_kwargs(trainer))


@attribute
def stats(trainer: StagesOfTrainer) -> dict[str, list[float]]:
    """For each metric since the last log, a list with its mean on this process."""
    return {name: [value] for name, value in trainer.metrics.means().items()}


@attribute
def completions(trainer: StagesOfTrainer) -> dict[str, list[Any]]:
    """The latest step's completions on this process as a table with one row each, as TRL's GRPO logs them.

    The columns are ``prompt``, ``completion``, one for each reward, and those that reward functions passed to
    ``log_extra``.
    """
    feedback = trainer.last_feedback
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
