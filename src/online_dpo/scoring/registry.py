"""From what a user passes as ``reward_funcs`` (a path, a model, a function, a scorer) to pointwise scorers."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.config.model_folder import folder_problem
from online_dpo.config.registry import Registry, made_once, nearest
from online_dpo.config.requirements import adapter_problem
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.config.training import unfit_for_flex_attention
from online_dpo.foreign import callable_name
from online_dpo.modeling.loading import looks_local, same_source, source_of, to_device
from online_dpo.scoring.protocols import PointwiseScorer, describe
from online_dpo.scoring.rewards.function import FunctionScorer
from online_dpo.scoring.rewards.loading import check_reward_model, last_part, load_reward_model
from online_dpo.scoring.rewards.model import RewardModelScorer

RewardFunc = str | nn.Module | Callable[..., Any] | PointwiseScorer
"""Path or hub name of a reward model, a loaded reward model, a function, or the user's own scorer."""

REWARDS: Registry[Callable[[], RewardFunc]] = Registry("reward")

Decorated = TypeVar("Decorated")


def reward(name: str) -> Callable[[Decorated], Decorated]:
    """Register a reward function or scorer, so that ``reward_funcs="name"`` selects it in Python and in run files.

    A class is instantiated without arguments when it is first used.

    >>> @reward("brevity")
    ... def brevity(completions, **columns): return [-len(text) for text in completions]

    Raises:
        RegistryError: the name is taken.
    """
    return REWARDS.decorator(name, made_once)


ProcessingClasses = PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None


def check_scorers(
    reward_funcs: RewardFunc | Sequence[RewardFunc], processing_classes: ProcessingClasses, args: OnlineDPOConfig
) -> None:
    """Check the rewards before any model is loaded.

    Raises:
        TypeError: a reward or a processing class is of a wrong type.
        ValueError: there is no reward; the numbers of rewards, processing classes, ``args.reward_weights`` and
            ``args.reward_normalization`` differ; a path does not exist or holds no model; a reward model has more than
            one label or no tokenizer.
    """
    rewards = _as_list(reward_funcs)
    if not rewards:
        raise ValueError("`reward_funcs` is empty. Give at least one reward model or reward function.")
    tokenizers = _tokenizers(processing_classes, len(rewards))
    weights = args.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(
            f"`reward_weights` has {len(weights)} numbers, but there are {len(rewards)} reward functions. "
            "Give one for each."
        )
    kinds = args.reward_normalization
    if not isinstance(kinds, str) and len(kinds) != len(rewards):
        raise ValueError(
            f"`reward_normalization` has {len(kinds)} entries, but there are {len(rewards)} reward functions. "
            "Give one for each, or one for all."
        )
    for reward, tokenizer in zip(rewards, tokenizers, strict=True):
        _check_reward(reward, tokenizer)


def build_scorers(
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    processing_classes: ProcessingClasses,
    args: OnlineDPOConfig,
    *,
    state: Callable[[], Any] | None,
) -> list[PointwiseScorer]:
    """Build one scorer for each reward, in order. A reward that is given twice is loaded once and gives one scorer.

    Functions receive the result of ``state()`` as ``trainer_state``. Reward models are moved to ``args.device``.

    Raises:
        TypeError, ValueError: see :func:`check_scorers`, :func:`load_reward_model` and the scorers.
    """
    check_scorers(reward_funcs, processing_classes, args)
    rewards = _as_list(reward_funcs)
    scorers: dict[tuple[Any, int], PointwiseScorer] = {}
    built = []
    for reward, tokenizer in zip(rewards, _tokenizers(processing_classes, len(rewards)), strict=True):
        key = (reward if isinstance(reward, str) else id(reward), id(tokenizer))
        if key not in scorers:
            scorers[key] = _build(reward, tokenizer, args, state)
        built.append(scorers[key])
    return built


def _build(
    reward: RewardFunc,
    tokenizer: PreTrainedTokenizerBase | None,
    args: OnlineDPOConfig,
    state: Callable[[], Any] | None,
) -> PointwiseScorer:
    prepare = functools.partial(to_device, device=args.device)
    attention = args.share_prompts, args.flex_attention, unfit_for_flex_attention(args)
    if isinstance(reward, str):
        model, tokenizer = load_reward_model(reward, tokenizer, trust_remote_code=args.trust_remote_code)
        name = last_part(reward)
        return RewardModelScorer(model, tokenizer, name, args.reward_batch_size, prepare, *attention)
    if isinstance(reward, nn.Module):
        return RewardModelScorer(reward, tokenizer, None, args.reward_batch_size, prepare, *attention)
    if tokenizer is not None:
        message = f"The processing class given for `{callable_name(reward)}` is ignored: it is no reward model."
        warnings.warn(message, stacklevel=3)
    if callable(reward):
        return FunctionScorer(reward, state=state)
    return reward


def check_reward_path(rewards: Any, path: str | None, field: str, argument: str) -> None:
    """Check that a reward model's path in the configuration and the rewards passed to the trainer agree.

    A script may name the reward model in the configuration, load it from that path, and pass the loaded model.

    Raises:
        ValueError: both the path (the configuration's ``field``) and rewards (``argument``) are given, and none of the
            rewards was loaded from that path.
    """
    if rewards is None or path is None:
        return
    sources = [source for source in map(source_of, _as_list(rewards)) if source is not None]
    if not any(same_source(source, path) for source in sources):
        found = f"comes from there (but from {', '.join(sources)})" if sources else "is a model from there"
        raise ValueError(
            f"`{field}` is given beside `{argument}`, none of which {found}. Put the path {path!r} into the list "
            f"`{argument}`, or leave it out."
        )


def check_reward_columns(
    reward_funcs: RewardFunc | Sequence[RewardFunc], columns: Collection[str], dataset: str
) -> None:
    """Check that the dataset has the columns that the reward functions need. ``dataset`` is its name in messages.

    Raises:
        ScoringError: a function needs a column that is not among ``columns``.
    """
    for reward in _as_list(reward_funcs):
        if callable(reward) and not isinstance(reward, nn.Module):
            FunctionScorer(reward).check_columns(columns, dataset)


def _check_reward(reward: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if isinstance(reward, str):
        _check_path(reward)
    elif isinstance(reward, nn.Module):
        config = check_reward_model(reward)
        if tokenizer is None and not config._name_or_path:
            raise ValueError(
                f"The reward model {type(reward).__name__} was not loaded from anywhere, so its tokenizer is unknown. "
                "Pass it in `reward_processing_classes`."
            )
    elif not callable(reward) and not isinstance(reward, PointwiseScorer):
        raise TypeError(
            "Each of `reward_funcs` must be the path or hub name of a reward model, a model, a function, or an object "
            f"with `name` and `score`; one is {describe(reward)}."
        )


def _check_path(path: str) -> None:
    if path.startswith(("http://", "https://")):
        raise ValueError(
            "A reward given as text is a reward model's folder or hub name, not an address of HTTP. For a service, "
            "give `HTTPReward(address)` from `online_dpo.scoring`."
        )
    expanded = os.path.expanduser(path)
    if not os.path.exists(expanded):
        if nearest(path, REWARDS):
            raise ValueError(f"Reward model `{path}` does not exist, and {REWARDS.unknown(path)}")
        if looks_local(path) or not path:
            raise ValueError(f"Reward model `{path}` does not exist. Give a folder, or a hub name such as `org/model`.")
        return
    if not any(os.path.isfile(os.path.join(expanded, name)) for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"Reward model `{path}` is no model folder: it holds neither config.json nor adapter_config.json."
        )
    if problem := adapter_problem(path) or folder_problem(path, "reward"):
        raise ValueError(f"Reward model {problem}")


def _as_list(reward_funcs: RewardFunc | Sequence[RewardFunc]) -> list[RewardFunc]:
    """The rewards, with what is registered in the place of its name."""
    rewards: list[Any] = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    return [REWARDS[one]() if isinstance(one, str) and one in REWARDS else one for one in rewards]


def _tokenizers(processing_classes: ProcessingClasses, count: int) -> list[PreTrainedTokenizerBase | None]:
    if processing_classes is None:
        return [None] * count
    given: list[Any] = (
        list(processing_classes) if isinstance(processing_classes, (list, tuple)) else [processing_classes]
    )
    if len(given) != count:
        raise ValueError(
            f"`reward_processing_classes` has {len(given)} entries, but there are {count} reward functions. "
            "Give one for each (`None` for a function)."
        )
    for tokenizer in given:
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"Each of `reward_processing_classes` must be a tokenizer or None; one is {describe(tokenizer)}."
            )
    return given
