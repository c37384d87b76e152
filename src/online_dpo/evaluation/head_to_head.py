"""Two models answer the same prompts with the same random numbers; scorers or a judge say which answers are better.

One model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.collate import prompts_from_batch
from online_dpo.data.prompts import prepare_prompts
from online_dpo.evaluation.comparison import Match, preferences_by_score
from online_dpo.foreign import loading
from online_dpo.modeling.forward_path import ForwardPath, choose_path
from online_dpo.modeling.introspection import end_token_ids
from online_dpo.modeling.known_tokens import VocabularyCheck, check_policy, embedding_rows
from online_dpo.modeling.loading import (
    check_model_path,
    disable_dropout,
    empty_device_cache,
    is_adapter,
    load_causal_lm,
    to_device,
)
from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from online_dpo.modeling.precision import mixed_precision
from online_dpo.packing.pack import pack_groups
from online_dpo.packing.prefix_tree import split_by_padded_size
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.builtin.sampling import reshapes
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from online_dpo.scoring.judges.llm.judge import LLMJudge
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.scoring.judges.tournament import ComparisonCounter
from online_dpo.scoring.penalties import Penalties
from online_dpo.scoring.protocols import PairwiseScorer, PointwiseScorer
from online_dpo.scoring.rewards.combine import score_groups
from online_dpo.types import Group, Prompt


@dataclass(frozen=True)
class Player:
    """A model that has not been loaded yet, and the prompts as its tokenizer reads them: as a prepared dataset, and by
    their row.
    """

    path: str
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    prompts: dict[int, Prompt]


@dataclass(frozen=True)
class Sampling:
    """How the models answer: ``samples`` answers to each prompt, the most probable token each time if ``greedy``; and
    whether the KL of the one to the other is estimated.
    """

    samples: int = 1
    greedy: bool = False
    kl: bool = True

    def params(self, args: OnlineDPOConfig, end_ids: tuple[int, ...]) -> SamplingParams:
        params = SamplingParams.from_config(args, end_ids)
        return replace(params, temperature=1.0, top_p=1.0, top_k=1, min_p=None) if self.greedy else params


@dataclass(frozen=True)
class Answers:
    """The answers of two players to the prompts that both can read, and the log-ratios of the first one's samples."""

    model: list[Group]
    against: list[Group]
    log_ratios: list[tuple[float, ...]]


def prepare_player(path: str, tokenizer: PreTrainedTokenizerBase, dataset: Any, args: OnlineDPOConfig) -> Player:
    """
    Raises:
        ValueError: the folder or a usable prompt is missing, or the model has no room for the prompts.
        InvalidPromptError: a row is no usable prompt, and ``args.invalid_prompts`` is "error".
    """
    check_model_path(path, "model")
    prepared, _ = prepare_prompts(dataset, tokenizer, args, name=f"prompts for {path}")
    assert isinstance(prepared, Dataset)
    prompts = prompts_from_batch(prepared[:])
    player = Player(path, tokenizer, prepared, {prompt.row: prompt for prompt in prompts})
    _check_room(player, args)
    return player


def same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether a token id means the same to both, so that one model can read the other's tokens."""
    return one.get_vocab() == other.get_vocab()


def answer(model: Player, against: Player, args: OnlineDPOConfig, sampling: Sampling) -> Answers:
    """Both players' answers; the log-ratios are empty without ``sampling.kl``.

    The KL is estimated from completions at temperature 1, which are sampled apart where answers are drawn otherwise:
    only those come from the distribution whose KL it is. It is the KL of completions of up to ``max_new_tokens``.
    """
    rows = sorted(model.prompts.keys() & against.prompts.keys())
    if not rows:
        raise ValueError("There is no prompt that both models can read.")
    dtype = _common_dtype(model, against, args)
    mine, plain, own = _play(model, rows, args, sampling, dtype)
    empty_device_cache()
    theirs, others = _answer_and_read(against, rows, plain, args, sampling, dtype)
    empty_device_cache()
    ratios = [tuple(a - b for a, b in zip(one, two, strict=True)) for one, two in zip(own, others, strict=True)]
    return Answers(mine, theirs, ratios or [()] * len(rows))


def unscored(answers: Answers) -> list[Match]:
    """The matches before anything is said of them."""
    return [
        Match(group, rival, (None,) * len(group.completions), log_ratios=ratios)
        for group, rival, ratios in zip(answers.model, answers.against, answers.log_ratios, strict=True)
    ]


def score_answers(
    answers: Answers, scorers: Sequence[PointwiseScorer], weights: Sequence[float] | None, penalties: Penalties
) -> list[Match]:
    """The matches as the scorers see them, less the penalties.

    Raises:
        ScoringError: a scorer failed.
    """
    both = score_groups([*answers.model, *answers.against], scorers, weights, penalties).values
    mine, theirs = both[: len(answers.model)], both[len(answers.model) :]
    return [
        Match(group, rival, preferences_by_score(a, b), tuple(a), tuple(b), ratios)
        for group, rival, a, b, ratios in zip(
            answers.model, answers.against, mine, theirs, answers.log_ratios, strict=True
        )
    ]


def judge_answers(answers: Answers, judge: PairwiseScorer, penalties: Penalties) -> list[Match]:
    """The matches as a judge sees them, less the penalties, asked in both orders unless it sees to its order itself.

    Raises:
        ScoringError: the judge failed.
    """
    pairs = list(zip(answers.model, answers.against, strict=True))
    comparisons = [
        Group(group.prompt, both)
        for group, rival in pairs
        for both in zip(group.completions, rival.completions, strict=True)
    ]
    told = iter(ComparisonCounter(judge if is_fair(judge) else BothOrders(judge), penalties)(comparisons))
    return [
        Match(group, rival, tuple(next(told) for _ in group.completions), log_ratios=ratios)
        for (group, rival), ratios in zip(pairs, answers.log_ratios, strict=True)
    ]


def is_fair(judge: PairwiseScorer) -> bool:
    """Whether a liking for the first place cancels in what this judge says."""
    return isinstance(judge, PairwiseModelJudge) or (isinstance(judge, LLMJudge) and judge.settings.order != "given")


class BothOrders:
    """Asks a judge with each completion first once. The preference is the mean, none where an order has no answer."""

    def __init__(self, judge: PairwiseScorer) -> None:
        self.name = judge.name
        self._judge = judge

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        turned = [Group(comparison.prompt, comparison.completions[::-1]) for comparison in comparisons]
        said = self._judge.prefer([*comparisons, *turned])
        return [
            None if first is None or second is None else (first + 1 - second) / 2
            for first, second in zip(said[: len(comparisons)], said[len(comparisons) :], strict=True)
        ]


def _check_room(player: Player, args: OnlineDPOConfig) -> None:
    """Read from the config alone, before any weights; an adapter's folder does not say."""
    if is_adapter(player.path):
        return
    config = AutoConfig.from_pretrained(player.path, trust_remote_code=args.trust_remote_code)
    text_config = config.get_text_config()
    VocabularyCheck({f"`{player.path}`": text_config.vocab_size}).check_prompts(player.prompts.values())
    room = getattr(text_config, "max_position_embeddings", None)
    longest = max(len(prompt.token_ids) for prompt in player.prompts.values()) + args.max_new_tokens
    if room is not None and longest > room:
        raise ValueError(
            f"`{player.path}` has room for {room} tokens; the longest prompt and its completion may have {longest}. "
            f"Set `max_length` to at most {room}."
        )


def _play(
    player: Player, rows: Sequence[int], args: OnlineDPOConfig, sampling: Sampling, dtype: str | torch.dtype
) -> tuple[list[Group], list[Group], list[list[float]]]:
    """Its answers; completions at temperature 1, which may be the same; and the log-probabilities of these."""
    model = _load(player, args, dtype)
    params = sampling.params(args, end_token_ids(model, player.tokenizer))
    answers = _sample(model, player, rows, params, args, sampling.samples, Stream.ANSWERS)
    if not sampling.kl:
        return answers, [], []
    plain = answers
    if reshapes(params) or params.extra:
        plain_params = SamplingParams(params.max_new_tokens, params.end_token_ids, stop_strings=params.stop_strings)
        plain = _sample(model, player, rows, plain_params, args, sampling.samples, Stream.FOR_KL)
    return answers, plain, _sequence_logprobs(model, plain, args)


def _answer_and_read(
    player: Player,
    rows: Sequence[int],
    plain: Sequence[Group],
    args: OnlineDPOConfig,
    sampling: Sampling,
    dtype: str | torch.dtype,
) -> tuple[list[Group], list[list[float]]]:
    """Its answers, and the log-probabilities that it gives to the other's completions."""
    model = _load(player, args, dtype)
    params = sampling.params(args, end_token_ids(model, player.tokenizer))
    VocabularyCheck({f"`{player.path}`": embedding_rows(model)}).check_groups(plain)
    answers = _sample(model, player, rows, params, args, sampling.samples, Stream.ANSWERS)
    return answers, _sequence_logprobs(model, plain, args) if plain else []


def _common_dtype(one: Player, other: Player, args: OnlineDPOConfig) -> str | torch.dtype:
    """The type that both are loaded in: as saved, or fp32 where that differs, as after training a checkpoint in bf16.

    Otherwise the KL would count the difference between the types.
    """
    saved = {_saved_dtype(player.path, args) for player in (one, other)}
    return "auto" if len(saved) == 1 else torch.float32


def _saved_dtype(path: str, args: OnlineDPOConfig) -> str:
    """The name that a model's config says, or that of an adapter's base model; ``None`` where it does not."""
    path = str(Path(path).expanduser())
    if is_adapter(path):
        from peft import PeftConfig

        base = PeftConfig.from_pretrained(path).base_model_name_or_path
        assert base is not None, "PEFT writes the base model's path into every adapter"
        path = base
    dtype = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code).dtype
    return str(dtype).removeprefix("torch.")


def _load(player: Player, args: OnlineDPOConfig, dtype: str | torch.dtype) -> nn.Module:
    init_kwargs: Any = args.model_init_kwargs
    with loading(player.path):
        model = load_causal_lm(player.path, init_kwargs, args.trust_remote_code, dtype)
    check_policy(model, player.tokenizer, {"prompts": player.dataset})
    disable_dropout(model)
    enable_logprobs(model)
    return to_device(model, args.device).eval()


def _sample(
    model: nn.Module,
    player: Player,
    rows: Sequence[int],
    params: SamplingParams,
    args: OnlineDPOConfig,
    samples: int,
    stream: Stream,
) -> list[Group]:
    engine = TransformersEngine(model, player.tokenizer, args.rollout_batch_size)
    with mixed_precision(args):
        return engine.generate([player.prompts[row] for row in rows], samples, params, RolloutKey(args.seed, 0, stream))


@torch.no_grad()
def _sequence_logprobs(model: nn.Module, groups: Sequence[Group], args: OnlineDPOConfig) -> list[list[float]]:
    """Log-probability of each completion of each group under the model, at temperature 1."""
    with mixed_precision(args):
        found = choose_path({"the model": lambda: nullcontext(model)}, groups, share=False)
        path = found[0] if found else ForwardPath()
        samples = len(groups[0].completions)
        sizes = [len(g.prompt.token_ids) + max(len(c.token_ids) for c in g.completions) for g in groups]
        longest_first = sorted(range(len(groups)), key=lambda p: -sizes[p])
        logps: dict[int, list[float]] = {}
        for batch in split_by_padded_size(longest_first, sizes, args.tokens_per_pass // samples):
            rows = pack_groups([groups[p] for p in batch], [], shared=False).to(args.device)
            logps_S = row_logprobs(model, rows, entropy=False, chunked=path.chunked).logps_S
            logps |= dict(zip(batch, logps_S.view(-1, samples).tolist(), strict=True))
    return [logps[p] for p in range(len(groups))]
