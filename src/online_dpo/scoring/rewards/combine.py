"""From what the user passes as rewards to scorers, and from several scorers to one number for each completion."""

from __future__ import annotations

import functools
import math
import numbers
import os
import statistics
import warnings
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.config.requirements import adapter_problem
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.errors import ScoringError
from online_dpo.foreign import among_rows, at_row, callable_name, foreign
from online_dpo.modeling.loading import looks_local, same_source, source_of, to_device
from online_dpo.scoring.penalties import NO_PENALTIES, Penalties
from online_dpo.scoring.protocols import AsyncPointwiseScorer, PointwiseScorer, describe
from online_dpo.scoring.rewards.function import FunctionScorer, submit, wait_for
from online_dpo.scoring.rewards.model import RewardModelScorer, check_reward_model, last_part, load_reward_model
from online_dpo.types import Group, Scores

RewardFunc = str | nn.Module | Callable[..., Any] | PointwiseScorer
"""Path or hub name of a reward model, a reward model, a function, or a scorer of one's own."""

ProcessingClasses = PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None

Values = list[list[float | None]]


def check_scorers(
    reward_funcs: RewardFunc | Sequence[RewardFunc], processing_classes: ProcessingClasses, args: OnlineDPOConfig
) -> None:
    """Find what is wrong with the rewards before any model is loaded.

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
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"`reward_weights` must be finite numbers; they are {weights}.")
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
    """A scorer for each reward, in their order. The same reward given twice is the same scorer, loaded once.

    ``state()`` is what functions receive as ``trainer_state``. Reward models are moved to ``args.device``.

    Raises:
        TypeError, ValueError: as :func:`check_scorers`, :func:`load_reward_model` and the scorers say.
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


def score_groups(
    groups: Sequence[Group],
    scorers: Sequence[PointwiseScorer],
    weights: Sequence[float] | None = None,
    penalties: Penalties = NO_PENALTIES,
    normalization: str | Sequence[str] = "none",
) -> Scores:
    """The weighted sum of all scorers for each completion, less its penalties.

    ``normalization`` is that of all scorers, or one for each: with ``group``, the numbers that pairs are formed by have
    in place of the scorer's own number its distance from the mean of those that the scorer gave in the group, in their
    standard deviations. The penalties are taken from that sum as well.

    A score is missing (``None``), never a number, where any scorer gave ``nan`` or an infinity. A scorer that gave
    ``None`` for every completion of a group does not apply to that prompt and is left out there; ``None`` for only some
    means that those are missing. Where no scorer applies, all are missing. ``by_scorer`` keeps what each scorer said,
    numbers that are not finite as ``None``, under its name (``f``, ``f_2`` where names repeat).

    ``async`` scorers wait beside each other and beside the others.

    Raises:
        ValueError: the numbers of weights and scorers differ.
        ScoringError: a scorer failed, or returned another shape than its groups have.
    """
    if weights is None:
        weights = [1.0] * len(scorers)
    if len(weights) != len(scorers):
        raise ValueError(f"There are {len(weights)} weights for {len(scorers)} scorers. Give one for each.")
    raw = _run(groups, scorers)
    kinds = [normalization] * len(scorers) if isinstance(normalization, str) else normalization
    values = _sums(groups, raw, weights, penalties)
    normalized = None
    if any(kind == "group" for kind in kinds):
        relative = [
            [_in_deviations(row) for row in said] if kind == "group" else said
            for said, kind in zip(raw, kinds, strict=True)
        ]
        normalized = [
            [None if value is None else score for value, score in zip(reported, row, strict=True)]
            for reported, row in zip(values, _sums(groups, relative, weights, penalties), strict=True)
        ]
    by_scorer = {
        name: [[_finite(value) for value in row] for row in scores]
        for name, scores in zip(unique_names(scorers), raw, strict=True)
    }
    return Scores(values, by_scorer, normalized)


def _sums(groups: Sequence[Group], said: Sequence[Values], weights: Sequence[float], penalties: Penalties) -> Values:
    """``said`` is what each scorer says of all groups."""
    return [
        [
            _total([values[p] for values in said], k, weights, penalties.of(completion))
            for k, completion in enumerate(group.completions)
        ]
        for p, group in enumerate(groups)
    ]


def _in_deviations(row: list[float | None]) -> list[float | None]:
    """The finite numbers of a group as their distance from their mean in standard deviations; 0 where all are equal.

    Scorers that contradict each other cancel: of two numbers the one is 1 and the other -1, exactly, however far from 0
    both are. So the mean is a fraction, and the result is rounded.
    """
    finite = [_finite(value) for value in row]
    numbers = [number for number in finite if number is not None]
    deviation = statistics.pstdev(numbers) if numbers else 0.0
    if deviation == 0:
        return [value if number is None else 0.0 for value, number in zip(row, finite, strict=True)]
    mean = statistics.mean(map(Fraction, numbers))
    return [
        value if number is None else round(float((Fraction(number) - mean) / Fraction(deviation)), 9)
        for value, number in zip(row, finite, strict=True)
    ]


def _total(rows: list[list[float | None]], k: int, weights: Sequence[float], penalty: float) -> float | None:
    """Completion ``k`` of one group; ``rows`` is what each scorer said about the group."""
    applying = [(row[k], weight) for row, weight in zip(rows, weights, strict=True) if any(v is not None for v in row)]
    numbers = [(value, weight) for value, weight in applying if value is not None]
    if not applying or len(numbers) < len(applying):
        return None
    if not all(math.isfinite(value) for value, _ in numbers):
        return None
    return _finite(sum(value * weight for value, weight in numbers) - penalty)


def _run(groups: Sequence[Group], scorers: Sequence[PointwiseScorer]) -> list[Values]:
    """What each scorer says; one that is listed twice is run once."""
    distinct = {id(scorer): scorer for scorer in scorers}
    waiting = {
        key: submit(scorer.score_async(groups))
        for key, scorer in distinct.items()
        if isinstance(scorer, AsyncPointwiseScorer) and scorer.is_async
    }
    results: dict[int, Values] = {}
    try:
        for key, scorer in sorted(distinct.items(), key=lambda item: item[0] in waiting):  # those that wait last
            with foreign(f"Scorer `{scorer.name}`", lambda: among_rows(groups)):
                said = wait_for(waiting[key]) if key in waiting else scorer.score(groups)
                results[key] = [list(row) for row in said]
            _check_scores(scorer.name, results[key], groups)
    finally:
        for future in waiting.values():
            future.cancel()
    return [results[id(scorer)] for scorer in scorers]


def _check_scores(name: str, scores: Values, groups: Sequence[Group]) -> None:
    returned, shape = [len(row) for row in scores], [len(group.completions) for group in groups]
    if returned != shape:
        raise ScoringError(
            f"Scorer `{name}` returned lists of {returned} scores for groups of {shape} completions. Return one list "
            "for each group, with one score for each completion."
        )
    for group, row in zip(groups, scores, strict=True):
        wrong = [value for value in row if value is not None and not isinstance(value, (numbers.Real, torch.Tensor))]
        if wrong:
            raise ScoringError(f"Scorer `{name}` gave {describe(wrong[0])}; wanted: numbers {at_row(group.prompt)}.")


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def unique_names(scorers: Sequence[PointwiseScorer]) -> list[str]:
    """Their names in metrics: ``f``, ``f_2`` where names repeat."""
    names: list[str] = []
    for scorer in scorers:
        name, count = scorer.name, 1
        while name in names:
            count += 1
            name = f"{scorer.name}_{count}"
        names.append(name)
    return names


def _build(
    reward: RewardFunc,
    tokenizer: PreTrainedTokenizerBase | None,
    args: OnlineDPOConfig,
    state: Callable[[], Any] | None,
) -> PointwiseScorer:
    prepare = functools.partial(to_device, device=args.device)
    if isinstance(reward, str):
        model, tokenizer = load_reward_model(reward, tokenizer, trust_remote_code=args.trust_remote_code)
        name = last_part(reward)
        return RewardModelScorer(model, tokenizer, name, args.reward_batch_size, prepare, args.share_prompts)
    if isinstance(reward, nn.Module):
        return RewardModelScorer(reward, tokenizer, None, args.reward_batch_size, prepare, args.share_prompts)
    if tokenizer is not None:
        message = f"The processing class given for `{callable_name(reward)}` is ignored: it is no reward model."
        warnings.warn(message, stacklevel=3)
    if callable(reward):
        return FunctionScorer(reward, state=state)
    return reward


def check_reward_path(rewards: Any, path: str | None, field: str, argument: str) -> None:
    """A script may name the reward model in the configuration, load it from there, and hand over the model.

    Raises:
        ValueError: the path (the configuration's ``field``) is given beside rewards (``argument``) none of which comes
            from there.
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
    """
    Raises:
        ScoringError: one of the functions needs a column that is none of ``columns``, those of ``dataset``.
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
    expanded = os.path.expanduser(path)
    if not os.path.exists(expanded):
        if looks_local(path) or not path:
            raise ValueError(f"Reward model `{path}` does not exist. Give a folder, or a hub name such as `org/model`.")
        return
    if not any(os.path.isfile(os.path.join(expanded, name)) for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"Reward model `{path}` is no model folder: it holds neither config.json nor adapter_config.json."
        )
    if problem := adapter_problem(path):
        raise ValueError(f"Reward model: {problem}")


def _as_list(reward_funcs: RewardFunc | Sequence[RewardFunc]) -> list[RewardFunc]:
    return list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]  # pyright: ignore[reportReturnType]


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
