"""The record of each held-out prompt of an evaluation, and the metrics that they add up to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from online_dpo.stats.bootstrap import standard_error
from online_dpo.stats.catalogue import Metric, describe
from online_dpo.stats.intervals import win_rate
from online_dpo.stats.moments import Moments
from online_dpo.stats.preference import preference_by_score
from online_dpo.types import Group, Notes, PackedRows, Pair, RowLogprobs

EVALUATION, GOLD, SCORED = "Evaluation", "with a gold scorer or judge", "with a reward"
ERROR, HOW_SURE = "standard error over prompts", "A difference of less than two of them is none."
describe(
    EVALUATION,
    Metric("eval_loss", "nats", "mean loss of the pairs formed of held-out prompts", "NaN where there was no pair."),
    Metric(
        "eval_objective/scores",
        "score",
        "mean over all scored completions of held-out prompts",
        "Whether what is learnt holds for other prompts.",
        SCORED,
    ),
    Metric("eval_objective/reference_scores", "score", "mean of the reference's completions", "The start.", SCORED),
    Metric(
        "eval_objective/kl",
        "nats",
        "mean over all completions of the summed log-ratio to the reference",
        "As `objective/kl`, not only of completions in pairs.",
        "with a reference",
    ),
    Metric("eval_objective/token_entropy", "nats", "mean over completions of their mean entropy", "As in training."),
    Metric("eval_completions/mean_length", "tokens", "mean over all completions", "As in training."),
    Metric(
        "eval_completions/score_length_correlation",
        "-1 to 1",
        "Pearson's correlation of score and length",
        "As in training.",
        SCORED,
    ),
    Metric("eval_val/contain_eos_token", "share", "completions that ended by themselves", "As in training."),
    Metric("eval_prompts", "prompts", "held-out prompts", "How many the figures rest on."),
    Metric("eval_prompts/cut", "prompts", "those that were longer than they may be", "As in training."),
    Metric(
        "eval_win_rate",
        "share",
        "completions that beat the reference's, by reward or judge; a tie counts half",
        "The main figure of an evaluation. The same random numbers are used each time.",
        "with a reference",
    ),
    Metric("eval_win_rate_ci95_low", "share", "lower end of its 95 % interval (Wilson)", "How sure it is."),
    Metric("eval_win_rate_ci95_high", "share", "upper end", "The same."),
    Metric(
        "eval_gold_score",
        "score",
        "mean of the gold scorer, which training never sees",
        "Falls while `eval_objective/scores` rises: overoptimisation.",
        GOLD,
    ),
    Metric("eval_gold_missing_ratio", "share", "completions without a gold score", "A fault of the gold scorer.", GOLD),
    Metric("eval_gold_win_rate", "share", "as `eval_win_rate`, by gold", "The honest win rate.", GOLD),
    Metric("eval_gold_win_rate_ci95_low", "share", "lower end of its 95 % interval", "How sure it is.", GOLD),
    Metric("eval_gold_win_rate_ci95_high", "share", "upper end", "The same.", GOLD),
    Metric("eval_gold_score_stderr", "score", ERROR, HOW_SURE, GOLD),
    Metric("eval_gold_win_rate_stderr", "share", ERROR, HOW_SURE, GOLD),
    Metric("eval_objective/scores_stderr", "score", ERROR, HOW_SURE, GOLD),
    Metric("eval_win_rate_stderr", "share", ERROR, HOW_SURE, GOLD),
)


@dataclass(frozen=True)
class GoldRecord:
    """The gold assessment of one held-out prompt: ``scores`` and ``win`` as those of :class:`EvalRecord`."""

    scores: tuple[float | None, ...]
    win: float | None


@dataclass(frozen=True)
class EvalRecord:
    """One held-out prompt.

    ``scores`` has one entry a completion, ``None`` where missing (all ``None`` with a judge alone); ``reference_score``
    is that of the reference's completion. ``win`` is the share of the policy's completions that beat the reference's (a
    tie counts half), ``None`` where it cannot be told. ``losses`` are those of the prompt's pairs. ``kl`` and
    ``entropy`` are nats per completion and per token. ``gold`` is ``None`` without a gold scorer. ``cut`` says whether
    the prompt was longer.
    """

    scores: tuple[float | None, ...]
    reference_score: float | None
    win: float | None
    losses: tuple[float, ...]
    kl: tuple[float, ...]
    entropy: tuple[float, ...]
    lengths: tuple[int, ...]
    finished: tuple[bool, ...]
    prompt_ids: tuple[int, ...] = ()
    gold: GoldRecord | None = None
    cut: bool = False


def win_share(scores: Sequence[float | None], reference_score: float | None) -> float | None:
    """The share of scored completions above the reference's score, ties counting half; ``None`` when nothing is scored.

    >>> win_share([2.0, 1.0, 0.0], 1.0)
    0.5
    """
    scored = [score for score in scores if score is not None]
    if reference_score is None or not scored:
        return None
    return sum(preference_by_score(score, reference_score) for score in scored) / len(scored)


def eval_records(
    groups: Sequence[Group],
    pairs: Sequence[Pair],
    scores: Sequence[Sequence[float | None]] | None,
    reference_scores: Sequence[float | None],
    wins: Sequence[float | None],
    rows: PackedRows,
    *,
    loss_N: torch.Tensor,
    policy: RowLogprobs,
    reference: RowLogprobs | None,
) -> list[EvalRecord]:
    """One record a group; ``rows`` has the completions of all groups in order, ``loss_N`` the losses of ``pairs``.

    ``scores`` are those of each group's completions, ``None`` with a judge alone.
    """
    losses: dict[int, list[float]] = {}
    for pair, loss in zip(pairs, loss_N.tolist(), strict=True):
        losses.setdefault(id(pair.group), []).append(loss)
    kl_S = [] if reference is None else (policy.logps_S - reference.logps_S).tolist()
    entropy_S = [float(part.mean()) for part in policy.entropy_M.split(rows.length_S.tolist())]
    records, start = [], 0
    for p, group in enumerate(groups):
        end = start + len(group.completions)
        records.append(
            EvalRecord(
                scores=(None,) * len(group.completions) if scores is None else tuple(scores[p]),
                reference_score=reference_scores[p],
                win=wins[p],
                losses=tuple(losses.get(id(group), ())),
                kl=tuple(kl_S[start:end]),
                entropy=tuple(entropy_S[start:end]),
                lengths=tuple(len(c.token_ids) for c in group.completions),
                finished=tuple(c.finish_reason == "stop" for c in group.completions),
                cut=group.prompt.cut,
                prompt_ids=group.prompt.token_ids,
            )
        )
        start = end
    return records


def judged_wins(
    groups: Sequence[Group], others: Sequence[Group], prefer: Callable[[list[Group]], list[float | None]]
) -> list[float | None]:
    """For each prompt a judge's probability that the group's first completion is better than the other's, ``None``
    where it gave no answer.
    """
    comparisons = [
        Group(group.prompt, (group.completions[0], other.completions[0]))
        for group, other in zip(groups, others, strict=True)
    ]
    return prefer(comparisons)


def summarise(records: Sequence[EvalRecord]) -> dict[str, float]:
    """The metrics of an evaluation, without prefix. A metric that no prompt gives a number for is left out."""
    means = {
        "loss": [loss for r in records for loss in r.losses],
        "objective/scores": [s for r in records for s in r.scores if s is not None],
        "objective/reference_scores": [r.reference_score for r in records if r.reference_score is not None],
        "objective/kl": [kl for r in records for kl in r.kl],
        "objective/token_entropy": [e for r in records for e in r.entropy],
        "completions/mean_length": [n for r in records for n in r.lengths],
        "val/contain_eos_token": [float(f) for r in records for f in r.finished],
    }
    metrics = {name: float(np.mean(values)) for name, values in means.items() if values}
    metrics.setdefault("loss", math.nan)  # the metric by which Trainer finds the best model unless told otherwise
    correlation = _score_length_correlation(records)
    metrics |= {} if correlation is None else {"completions/score_length_correlation": correlation}
    metrics["prompts"] = float(len(records))
    metrics["prompts/cut"] = float(sum(record.cut for record in records))
    metrics |= _win_rate_metrics("win_rate", [r.win for r in records if r.win is not None])
    gold = [(record, record.gold) for record in records if record.gold is not None]
    return metrics | (gold_metrics(gold) if gold else {})


def _score_length_correlation(records: Sequence[EvalRecord]) -> float | None:
    known = [
        (score, length)
        for record in records
        for score, length in zip(record.scores, record.lengths, strict=True)
        if score is not None
    ]
    return Moments.of([score for score, _ in known], [length for _, length in known]).correlation()


def mean_notes(notes: Sequence[Notes]) -> dict[str, float]:
    """The means of what reward functions noted on all ranks, under the names that they gave."""
    names = sorted({name for of_rank in notes for name in of_rank.metrics})
    values = {name: [value for of_rank in notes for value in of_rank.metrics.get(name, [])] for name in names}
    return {name: float(np.mean(values[name])) for name in names}


def prefixed(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Returns the metrics with ``prefix_`` before each name that does not begin with it.

    >>> prefixed({"loss": 0.6, "eval_accuracy": 0.5}, "eval")
    {'eval_loss': 0.6, 'eval_accuracy': 0.5}
    """
    start = f"{prefix}_"
    return {name if name.startswith(start) else start + name: value for name, value in metrics.items()}


def gold_metrics(records: Sequence[tuple[EvalRecord, GoldRecord]]) -> dict[str, float]:
    """The metrics of the gold scorer, and the standard errors of its figures and of those of training."""
    scores = [score for _, gold in records for score in gold.scores]
    present = [score for score in scores if score is not None]
    wins = [gold.win for _, gold in records if gold.win is not None]
    metrics: dict[str, float] = {}
    if scores:
        metrics["gold_missing_ratio"] = 1 - len(present) / len(scores)
    if present:
        metrics["gold_score"] = float(np.mean(present))
    return metrics | _win_rate_metrics("gold_win_rate", wins) | _standard_errors(records)


def _standard_errors(records: Sequence[tuple[EvalRecord, GoldRecord]]) -> dict[str, float]:
    """How sure the training score and the gold score are: over prompts, since the completions of one are alike."""
    by_prompt = {
        "objective/scores": [_mean(record.scores) for record, _ in records],
        "win_rate": [record.win for record, _ in records],
        "gold_score": [_mean(gold.scores) for _, gold in records],
        "gold_win_rate": [gold.win for _, gold in records],
    }
    errors = {}
    for name, values in by_prompt.items():
        error = standard_error(np.array([value for value in values if value is not None]))
        if error is not None:
            errors[f"{name}_stderr"] = error
    return errors


def _win_rate_metrics(name: str, wins: Sequence[float]) -> dict[str, float]:
    if not wins:
        return {}
    return dict(zip((name, f"{name}_ci95_low", f"{name}_ci95_high"), win_rate(wins), strict=True))


def _mean(scores: Sequence[float | None]) -> float | None:
    present = [score for score in scores if score is not None]
    return sum(present) / len(present) if present else None
