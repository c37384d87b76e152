"""Records what became of the groups: pairs, or a reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.stats.catalogue import Metric, describe
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.rollout import OPPONENT, record_comparisons
from online_dpo.types import Completion, Pair, Pairing, Round, Verdicts

RESAMPLING = "with `resample_rounds`"

describe(
    "Pairs",
    Metric("pairs/count", "pairs", "pairs trained on", "What a step learns from. 0 for many steps: the run stops."),
    Metric("pairs/groups", "groups", "groups that gave a pair", "One group may give several pairs (`pair_selection`)."),
    Metric(
        "pairs/usable_ratio",
        "share",
        "groups that gave a pair / groups",
        "Below some 50 %, half of the sampling is wasted: raise `num_completions`, `temperature` or `resample_rounds`.",
    ),
    Metric(
        "pairs/tie_rate",
        "share",
        "groups whose scores are all equal / groups",
        "High where prompts are too easy or too hard, or a reward is too coarse.",
    ),
    Metric(
        "pairs/probability",
        "share",
        "mean probability that the chosen completion is the better one",
        "How sure the labels are; 1 unless they are soft (a judge, `label_temperature`).",
    ),
    Metric(
        "pairs/left_out/REASON",
        "pairs",
        "pairs left out of groups that have others, for `margin` or `length_ratio`",
        "Whether `min_margin` or `max_length_ratio` takes too much.",
        when="with `min_margin` or `max_length_ratio`",
    ),
    Metric(
        "dropped/REASON",
        "groups",
        "groups without a pair: `tie`, `missing_score`, `no_answer`, `contradiction`, `identical`, `margin`, "
        "`length_ratio`; and `invalid_prompt`, prompts that could not be used",
        "Why sampling was wasted. `prompts` equals `pairs/groups` plus all of these.",
    ),
    Metric(
        "objective/scores_margin",
        "score",
        "mean over pairs of the chosen completion's score minus the rejected one's",
        "How clear the labels are. When it shrinks, the policy's answers become alike.",
        when="with a reward",
    ),
    Metric(
        "completions/chosen_length",
        "tokens",
        "mean length of the chosen completions of the pairs",
        "Against `completions/rejected_length`: what labels say of length.",
    ),
    Metric(
        "completions/rejected_length", "tokens", "mean length of the rejected completions of the pairs", "The same."
    ),
    Metric(
        "completions/chosen_minus_rejected_length",
        "tokens",
        "mean over pairs of the chosen completion's length minus the rejected one's",
        "Above 0 for long, training teaches longer answers.",
    ),
    Metric(
        "opponent/win_rate",
        "share",
        "mean probability, over pairs of policy and opponent, that the policy's completion is the better one",
        "Whether the policy beats its opponent in training.",
        when=OPPONENT,
    ),
    Metric("resample/groups", "groups", "groups that were answered again", "What resampling costs.", RESAMPLING),
    Metric(
        "resample/rescued",
        "groups",
        "groups that gave a pair after having been answered again",
        "What resampling gains.",
        RESAMPLING,
    ),
)


def record_pairs(store: MetricStore, num_groups: int, pairing: Pairing) -> None:
    """Records how many groups became pairs, why others were dropped, and the means over pairs."""
    pairs, dropped = pairing.pairs, pairing.dropped
    num_used = num_groups - dropped.total()
    store.total("pairs/count", len(pairs))
    store.total("pairs/groups", num_used)
    store.ratio("pairs/usable_ratio", num_used, num_groups)
    store.ratio("pairs/tie_rate", dropped["tie"], num_groups)
    for reason, count in dropped.items():
        store.total(f"dropped/{reason}", count)
    for reason, count in pairing.left_out.items():
        store.total(f"pairs/left_out/{reason}", count)
    store.mean("pairs/probability", [pair.probability for pair in pairs])
    store.mean("opponent/win_rate", [_probability_against_opponent(pair) for pair in pairs if _has_opponent(pair)])
    store.mean("objective/scores_margin", [pair.margin for pair in pairs if pair.margin is not None])
    store.mean("completions/chosen_length", [float(len(pair.chosen_completion.token_ids)) for pair in pairs])
    store.mean("completions/rejected_length", [float(len(pair.rejected_completion.token_ids)) for pair in pairs])
    store.mean(
        "completions/chosen_minus_rejected_length",
        [_length_gap(p.chosen_completion, p.rejected_completion) for p in pairs],
    )


def record_resampling(store: MetricStore, further: Sequence[Round], pairing: Pairing) -> None:
    """Records how many groups were answered again, and with what gain; ``pairing`` is the final one of the step.

    Lengths and scores of these answers are recorded nowhere: who is asked again is decided by the scores, so means over
    these answers, or over the last ones of each prompt, would not show how good the policy is.
    """
    for again in further:
        if isinstance(again.said, Verdicts):
            record_comparisons(store, again.said)
    asked_again = len(further[0].places) if further else 0
    dropped = pairing.dropped.total() if further else 0  # a checkpoint from before there were rounds has none
    store.total("resample/groups", asked_again)
    store.total("resample/rescued", asked_again - dropped)


def _has_opponent(pair: Pair) -> bool:
    return pair.chosen_completion.by_policy != pair.rejected_completion.by_policy


def _probability_against_opponent(pair: Pair) -> float:
    return pair.probability if pair.chosen_completion.by_policy else 1 - pair.probability


def _length_gap(chosen: Completion, rejected: Completion) -> float:
    return float(len(chosen.token_ids) - len(rejected.token_ids))
