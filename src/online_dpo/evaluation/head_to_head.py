"""Head-to-head evaluation: two models answer the same prompts, and scorers or a judge compare the answers.

Both models sample with the same random numbers. Only one model is in memory at a time.
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
from online_dpo.distributed.device_memory import empty_device_cache
from online_dpo.evaluation.comparison import PromptResult, preferences_by_score
from online_dpo.foreign import loading
from online_dpo.modeling.forward_path import ForwardPath, choose_path
from online_dpo.modeling.introspection import end_token_ids
from online_dpo.modeling.known_tokens import VocabularyCheck, check_policy, embedding_rows
from online_dpo.modeling.loaded import check_finite
from online_dpo.modeling.loading import (
    check_model_path,
    disable_dropout,
    is_adapter,
    load_causal_lm,
    to_device,
)
from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from online_dpo.modeling.precision import mixed_precision
from online_dpo.modeling.weight_casts import weights_cast_once
from online_dpo.packing.pack import pack_groups
from online_dpo.packing.prefix_tree import split_by_padded_size
from online_dpo.rollout.builtin.sampling import reshapes
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from online_dpo.rollout.registry import built_in_engine
from online_dpo.scoring.judges.tournament import ComparisonCounter
from online_dpo.scoring.penalties import Penalties
from online_dpo.scoring.protocols import PairwiseScorer, PointwiseScorer, is_fair
from online_dpo.scoring.rewards.combine import score_groups
from online_dpo.types import Group, Prompt


@dataclass(frozen=True)
class ComparedModel:
    """A model to compare, which is not loaded yet, with the prompts tokenised for it: as a dataset, and by row."""

    path: str
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    prompts: dict[int, Prompt]


@dataclass(frozen=True)
class Sampling:
    """How the models answer: the number of ``samples`` for each prompt, whether decoding is ``greedy``, and whether the
    KL divergence is estimated.
    """

    samples: int = 1
    greedy: bool = False
    kl: bool = True

    def params(self, args: OnlineDPOConfig, end_ids: tuple[int, ...]) -> SamplingParams:
        """The engine's sampling parameters: those of the configuration, or greedy ones."""
        params = SamplingParams.from_config(args, end_ids)
        return replace(params, temperature=1.0, top_p=1.0, top_k=1, min_p=None) if self.greedy else params


@dataclass(frozen=True)
class Answers:
    """The answers of both models to the prompts that both can read, and the log-ratios of the first model's samples."""

    model: list[Group]
    against: list[Group]
    log_ratios: list[tuple[float, ...]]


def prepare_model(path: str, tokenizer: PreTrainedTokenizerBase, dataset: Any, args: OnlineDPOConfig) -> ComparedModel:
    """Check a model's path and prepare the prompts for it, without loading the model.

    Raises:
        ValueError: the folder does not exist, there is no usable prompt, or a prompt is too long for the model.
        InvalidPromptError: a row is not a usable prompt, and ``args.invalid_prompts`` is "error".
    """
    check_model_path(path, "model")
    prepared, _ = prepare_prompts(dataset, tokenizer, args, name=f"prompts for {path}")
    assert isinstance(prepared, Dataset)
    prompts = prompts_from_batch(prepared[:])
    model = ComparedModel(path, tokenizer, prepared, {prompt.row: prompt for prompt in prompts})
    _check_context_length(model, args)
    return model


def same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same ids, so that one model can read the other's tokens."""
    return one.get_vocab() == other.get_vocab()


def answer(model: ComparedModel, against: ComparedModel, args: OnlineDPOConfig, sampling: Sampling) -> Answers:
    """Load both models, one after the other, and sample their answers. Without ``sampling.kl``, log-ratios are empty.

    The KL is that of completions of up to ``max_new_tokens`` at temperature 1. If the answers are sampled with other
    settings, separate completions are sampled for it: an estimate needs samples of the distribution itself.

    Raises:
        ValueError: there is no prompt that both models can read, or a model cannot read the other's tokens.
    """
    rows = sorted(model.prompts.keys() & against.prompts.keys())
    if not rows:
        raise ValueError("There is no prompt that both models can read. Give other prompts, or raise `max_length`.")
    dtype = _common_dtype(model, against, args)
    model_answers, kl_samples, model_logps = _answer_and_sample_for_kl(model, rows, args, sampling, dtype)
    empty_device_cache()
    against_answers, against_logps = _answer_and_read(against, rows, kl_samples, args, sampling, dtype)
    empty_device_cache()
    log_ratios = [
        tuple(a - b for a, b in zip(ours, others, strict=True))
        for ours, others in zip(model_logps, against_logps, strict=True)
    ]
    return Answers(model_answers, against_answers, log_ratios or [()] * len(rows))


def unscored_results(answers: Answers) -> list[PromptResult]:
    """The results without scores and preferences, to be written before scoring, which may fail."""
    return [
        PromptResult(group, opponent, (None,) * len(group.completions), log_ratios=log_ratios)
        for group, opponent, log_ratios in zip(answers.model, answers.against, answers.log_ratios, strict=True)
    ]


def score_answers(
    answers: Answers, scorers: Sequence[PointwiseScorer], weights: Sequence[float] | None, penalties: Penalties
) -> list[PromptResult]:
    """Score the answers, minus penalties; the higher score wins.

    Raises:
        ScoringError: a scorer failed.
    """
    scores = score_groups([*answers.model, *answers.against], scorers, weights, penalties).values
    model_scores, against_scores = scores[: len(answers.model)], scores[len(answers.model) :]
    return [
        PromptResult(group, opponent, preferences_by_score(a, b), tuple(a), tuple(b), log_ratios)
        for group, opponent, a, b, log_ratios in zip(
            answers.model, answers.against, model_scores, against_scores, answers.log_ratios, strict=True
        )
    ]


def judge_answers(answers: Answers, judge: PairwiseScorer, penalties: Penalties) -> list[PromptResult]:
    """Compare the answers with a judge, minus penalties.

    A judge that is not free of position bias is asked in both orders.

    Raises:
        ScoringError: the judge failed.
    """
    pairs = list(zip(answers.model, answers.against, strict=True))
    comparisons = [
        Group(group.prompt, both)
        for group, opponent in pairs
        for both in zip(group.completions, opponent.completions, strict=True)
    ]
    compare = ComparisonCounter(judge if is_fair(judge) else BothOrders(judge), penalties)
    preferences = iter(compare(comparisons))
    return [
        PromptResult(group, opponent, tuple(next(preferences) for _ in group.completions), log_ratios=log_ratios)
        for (group, opponent), log_ratios in zip(pairs, answers.log_ratios, strict=True)
    ]


class BothOrders:
    """A judge that asks another judge in both orders, so that position bias cancels.

    The preference is the mean of both, ``None`` if one of them has no answer.
    """

    is_fair = True

    def __init__(self, judge: PairwiseScorer) -> None:
        self.name = judge.name
        self._judge = judge

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """Return the mean preference of both orders, as :meth:`PairwiseScorer.prefer`."""
        swapped = [Group(comparison.prompt, comparison.completions[::-1]) for comparison in comparisons]
        answers = self._judge.prefer([*comparisons, *swapped])
        return [
            None if first is None or second is None else (first + 1 - second) / 2
            for first, second in zip(answers[: len(comparisons)], answers[len(comparisons) :], strict=True)
        ]


def _check_context_length(model: ComparedModel, args: OnlineDPOConfig) -> None:
    """Check prompts against the model's config, before any weights are loaded.

    The folder of an adapter does not contain the config of its base model, so adapters are not checked here.
    """
    if is_adapter(model.path):
        return
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=args.trust_remote_code)
    text_config = config.get_text_config()
    VocabularyCheck({f"`{model.path}`": text_config.vocab_size}).check_prompts(model.prompts.values())
    context = getattr(text_config, "max_position_embeddings", None)
    longest = max(len(prompt.token_ids) for prompt in model.prompts.values()) + args.max_new_tokens
    if context is not None and longest > context:
        raise ValueError(
            f"`{model.path}` has room for {context} tokens; the longest prompt and its completion may have {longest}. "
            f"Set `max_length` to at most {context}."
        )


def _answer_and_sample_for_kl(
    compared: ComparedModel, rows: Sequence[int], args: OnlineDPOConfig, sampling: Sampling, dtype: str | torch.dtype
) -> tuple[list[Group], list[Group], list[list[float]]]:
    """The first model's answers, its samples at temperature 1 (the same, if answers are), and their log-probabilities.

    The last two are empty if no KL is estimated.
    """
    model = _load(compared, args, dtype)
    params = sampling.params(args, end_token_ids(model, compared.tokenizer))
    answers = _sample(model, compared, rows, params, args, sampling.samples, Stream.ANSWERS)
    if not sampling.kl:
        return answers, [], []
    kl_samples = answers
    if reshapes(params) or params.extra:
        plain_params = SamplingParams(params.max_new_tokens, params.end_token_ids, stop_strings=params.stop_strings)
        kl_samples = _sample(model, compared, rows, plain_params, args, sampling.samples, Stream.FOR_KL)
    return answers, kl_samples, _sequence_logprobs(model, kl_samples, args)


def _answer_and_read(
    compared: ComparedModel,
    rows: Sequence[int],
    kl_samples: Sequence[Group],
    args: OnlineDPOConfig,
    sampling: Sampling,
    dtype: str | torch.dtype,
) -> tuple[list[Group], list[list[float]]]:
    """The second model's answers, and the log-probabilities that it gives to the first model's samples."""
    model = _load(compared, args, dtype)
    params = sampling.params(args, end_token_ids(model, compared.tokenizer))
    VocabularyCheck({f"`{compared.path}`": embedding_rows(model)}).check_groups(kl_samples)
    answers = _sample(model, compared, rows, params, args, sampling.samples, Stream.ANSWERS)
    return answers, _sequence_logprobs(model, kl_samples, args) if kl_samples else []


def _common_dtype(one: ComparedModel, other: ComparedModel, args: OnlineDPOConfig) -> str | torch.dtype:
    """The type in which both models are loaded: "auto" if both were saved in the same type, else fp32.

    With different types, as after training a bf16 checkpoint in fp32, the KL would include the rounding between them.
    """
    saved = {_saved_dtype(model.path, args) for model in (one, other)}
    return "auto" if len(saved) == 1 else torch.float32


def _saved_dtype(path: str, args: OnlineDPOConfig) -> str:
    """The type in the config of a model, or of an adapter's base model; "None" if the config does not say."""
    path = str(Path(path).expanduser())
    if is_adapter(path):
        from peft import PeftConfig

        base = PeftConfig.from_pretrained(path).base_model_name_or_path
        assert base is not None, "PEFT writes the base model's path into every adapter"
        path = base
    dtype = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code).dtype
    return str(dtype).removeprefix("torch.")


def _load(compared: ComparedModel, args: OnlineDPOConfig, dtype: str | torch.dtype) -> nn.Module:
    init_kwargs: Any = args.model_init_kwargs
    with loading(compared.path):
        model = load_causal_lm(compared.path, init_kwargs, args.trust_remote_code, dtype)
    check_finite(model, compared.path)
    check_policy(model, compared.tokenizer, {"prompts": compared.dataset})
    disable_dropout(model)
    enable_logprobs(model)
    return to_device(model, args.device).eval()


def _sample(
    model: nn.Module,
    compared: ComparedModel,
    rows: Sequence[int],
    params: SamplingParams,
    args: OnlineDPOConfig,
    samples: int,
    stream: Stream,
) -> list[Group]:
    engine = built_in_engine(model, compared.tokenizer, args)
    prompts = [compared.prompts[row] for row in rows]
    with mixed_precision(args):
        return engine.generate(prompts, samples, params, RolloutKey(args.seed, 0, stream))


@torch.no_grad()
def _sequence_logprobs(model: nn.Module, groups: Sequence[Group], args: OnlineDPOConfig) -> list[list[float]]:
    """Compute the log-probability of each completion of each group under the model, at temperature 1."""
    with mixed_precision(args), weights_cast_once(model):
        choice = choose_path({"the model": lambda: nullcontext(model)}, groups, share=False)
        path = choice[0] if choice else ForwardPath()
        samples = len(groups[0].completions)
        sizes = [len(g.prompt.token_ids) + max(len(c.token_ids) for c in g.completions) for g in groups]
        longest_first = sorted(range(len(groups)), key=lambda p: -sizes[p])
        logps: dict[int, list[float]] = {}
        for batch in split_by_padded_size(longest_first, sizes, args.tokens_per_pass // samples):
            rows = pack_groups([groups[p] for p in batch], [], shared=False).to(args.device)
            logps_S = row_logprobs(model, rows, entropy=False, chunked=path.chunked).logps_S
            logps |= dict(zip(batch, logps_S.view(-1, samples).tolist(), strict=True))
    return [logps[p] for p in range(len(groups))]
