"""Records what was sampled and what was said of it."""

from __future__ import annotations

from online_dpo.scoring.protocols import Counts
from online_dpo.stats.catalogue import Metric, describe
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.agreement import record_agreement_of_scorers
from online_dpo.training.metrics.diversity import record_diversity
from online_dpo.types import Completion, Group, Notes, Scores, Verdicts

OPPONENT = "with `method: xpo` or `nash_md`"

describe(
    "Completions",
    Metric(
        "completions/mean_length",
        "tokens",
        "mean over the policy's completions",
        "Whether answers grow. Rising with the score, it may be all that the score has learnt to like.",
    ),
    Metric(
        "completions/clipped_ratio",
        "share",
        "completions that ran out of tokens (`max_new_tokens`) / completions",
        "Above some 10 %, raise `max_new_tokens` or set `missing_eos_penalty`: cut answers are judged unfairly.",
    ),
    Metric(
        "val/contain_eos_token",
        "share",
        "completions that ended by themselves / completions",
        "TRL's name of 1 minus `completions/clipped_ratio`.",
    ),
    Metric(
        "completions/score_length_correlation",
        "-1 to 1",
        "Pearson's correlation of score and length in tokens over all scored completions since the last log",
        "Near 1, the reward pays for length: set `length_penalty` or `max_length_ratio`, or mend the reward.",
        when="with scores that differ",
    ),
    Metric(
        "opponent/mean_length", "tokens", "mean over the opponent's completions", "Compare with the policy's.", OPPONENT
    ),
)
describe(
    "Scores",
    Metric(
        "objective/scores",
        "score",
        "mean over the policy's scored completions of the weighted sum of rewards, penalties taken off; with "
        "`resample_rounds` over the first answers",
        "The figure that training raises. Read it beside `objective/kl`, the length and a gold score.",
        when="with a reward",
    ),
    Metric(
        "scores/NAME",
        "score",
        "mean of what the scorer NAME gave, before weights, penalties and normalisation",
        "Which of several rewards rises, and which pays for it.",
        when="with a reward",
    ),
    Metric(
        "scores/NAME/missing_ratio",
        "share",
        "completions to which NAME gave no score / completions",
        "A missing score takes a completion out of all pairs. A high share is a fault of the scorer or the data.",
        when="with a reward",
    ),
    Metric(
        "opponent/scores",
        "score",
        "mean over the opponent's scored completions",
        "Compare with the policy's.",
        OPPONENT,
    ),
)
describe(
    "Judges",
    Metric(
        "judge/duels",
        "comparisons",
        "comparisons of two completions that a judge was asked for",
        "What a judge costs; a tournament of K completions needs more than one a prompt.",
        when="with a judge",
    ),
    Metric(
        "judge/unanswered_ratio",
        "share",
        "comparisons without an answer / comparisons",
        "Work that is lost. See `judge/failed` and `judge/unparsable`.",
        when="with a judge",
    ),
)


def record_rollout(store: MetricStore, groups: list[Group], assessment: Scores | Verdicts, version: int) -> None:
    """Records the results of sampling and scoring, over the completions that the policy wrote.

    Those of its opponent, if it has one, are under ``opponent/``. ``version`` is that of the policy which is trained.
    """
    everything = [completion for group in groups for completion in group.completions]
    opponents = [completion for completion in everything if not completion.by_policy]
    store.mean("opponent/mean_length", [float(len(c.token_ids)) for c in opponents])
    _record_completions(store, [completion for completion in everything if completion.by_policy], version)
    record_diversity(store, groups)
    if isinstance(assessment, Verdicts):
        record_comparisons(store, assessment)
    scores = assessment.scores if isinstance(assessment, Verdicts) else assessment
    if scores is not None:
        _record_scores(store, groups, scores)


def _record_completions(store: MetricStore, completions: list[Completion], version: int) -> None:
    store.mean("sampling/staleness", [float(version - c.policy_version) for c in completions])
    store.mean("completions/mean_length", [float(len(c.token_ids)) for c in completions])
    store.mean("completions/clipped_ratio", [float(c.finish_reason == "length") for c in completions])
    store.mean("val/contain_eos_token", [float(c.finish_reason == "stop") for c in completions])


def _record_scores(store: MetricStore, groups: list[Group], scores: Scores) -> None:
    store.mean("objective/scores", _present(scores.values, groups))
    store.mean("opponent/scores", _present(scores.values, groups, by_policy=False))
    for name, values in scores.by_scorer.items():
        store.mean(f"scores/{name}", _present(values, groups))
        store.mean(f"scores/{name}/missing_ratio", [float(value is None) for row in values for value in row])
    record_agreement_of_scorers(store, scores)
    scored = [(value, len(c.token_ids)) for value, c in _scored(scores.values, groups) if c.by_policy]
    if scored:
        store.correlation("completions/score_length_correlation", *zip(*scored, strict=True))


def record_notes(store: MetricStore, notes: Notes | None) -> None:
    """Records what reward functions noted through ``log_metric``, under the names that they gave."""
    for name, values in ({} if notes is None else notes.metrics).items():
        store.mean(name, values)


def record_counts(store: MetricStore, counts: Counts) -> None:
    """Records what a judge has counted, such as requests and failures."""
    for name, amount in counts.sums.items():
        store.total(name, amount)
    for name, (part, whole) in counts.rates.items():
        store.ratio(name, part, whole)


def record_comparisons(store: MetricStore, assessment: Verdicts) -> None:
    """Records how many comparisons a judge was asked for, and how many it left without an answer."""
    store.total("judge/duels", assessment.duels)
    store.ratio("judge/unanswered_ratio", assessment.unanswered, assessment.duels)


def _present(values: list[list[float | None]], groups: list[Group], by_policy: bool = True) -> list[float]:
    """The scores that there are of the completions that the policy, or its opponent, wrote."""
    return [value for value, completion in _scored(values, groups) if completion.by_policy == by_policy]


def _scored(values: list[list[float | None]], groups: list[Group]) -> list[tuple[float, Completion]]:
    """The scores that there are, each with its completion."""
    return [
        (value, completion)
        for row, group in zip(values, groups, strict=True)
        for value, completion in zip(row, group.completions, strict=True)
        if value is not None
    ]
