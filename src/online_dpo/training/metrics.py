"""Records the metrics of the stages of a step in a `MetricStore`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from online_dpo.scoring.protocols import Counts
from online_dpo.training.metric_store import MetricStore
from online_dpo.types import Completion, Group, Notes, PackedRows, Pair, Pairing, Round, RowLogprobs, Scores, Verdicts

STEP_KL = "step/kl"
"""Collected for the step alone, see `MetricStore.take_mean`."""


def record_rollout(store: MetricStore, groups: list[Group], assessment: Scores | Verdicts, version: int) -> None:
    """Records the results of sampling and scoring, over the completions that the policy wrote.

    Those of its opponent, if it has one, are under ``opponent/``. ``version`` is that of the policy which is trained.
    """
    everything = [completion for group in groups for completion in group.completions]
    store.total("completion_tokens", sum(len(c.token_ids) for c in everything))
    opponents = [completion for completion in everything if not completion.by_policy]
    store.mean("opponent/mean_length", [float(len(c.token_ids)) for c in opponents])
    _record_completions(store, [completion for completion in everything if completion.by_policy], version)
    if isinstance(assessment, Verdicts):
        _record_comparisons(store, assessment)
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
    store.mean(
        "completions/chosen_minus_rejected_length",
        [_length_gap(p.chosen_completion, p.rejected_completion) for p in pairs],
    )


def record_resampling(store: MetricStore, further: Sequence[Round], pairing: Pairing) -> None:
    """Records the cost and the gain of answering prompts again; ``pairing`` is the final one of the step.

    Lengths and scores of these answers are recorded nowhere: who is asked again is decided by the scores, so means over
    these answers, or over the last ones of each prompt, would not show how good the policy is.
    """
    for again in further:
        completions = [c for group in again.groups for c in group.completions if c.by_policy]
        store.total("completion_tokens", sum(len(c.token_ids) for c in completions))
        if isinstance(again.said, Verdicts):
            _record_comparisons(store, again.said)
    asked_again = len(further[0].places) if further else 0
    dropped = pairing.dropped.total() if further else 0  # a checkpoint from before there were rounds has none
    store.total("resample/groups", asked_again)
    store.total("resample/rescued", asked_again - dropped)


def record_loss(
    store: MetricStore,
    rows: PackedRows,
    policy: RowLogprobs,
    reference: RowLogprobs | None,
    loss_N: torch.Tensor,
    beta: float,
) -> None:
    """Records the results of the forward passes, over the pairs that are trained on (a stand-in counts nowhere).

    Means over completions are over those that the policy wrote. ``objective/kl`` is the mean of the summed log-ratio to
    the reference, an estimate of the sequence KL in nats; ``objective/entropy`` that of minus the summed
    log-probability; ``objective/token_entropy`` the mean over tokens of the entropy of the whole next-token
    distribution. ``objective/rlhf_reward`` is ``objective/trained_scores`` plus ``objective/non_score_reward``, all
    three of the completions trained on. Without a reference, what is relative to it is left out.
    """
    store.mean("beta", beta)
    real_N = rows.weight_N > 0
    if not real_N.any():
        return
    store.mean("loss", loss_N[real_N])
    _record_policy(store, rows, policy)
    if reference is not None:
        _record_rewards(store, rows, beta * (policy.logps_S.detach() - reference.logps_S))
        store.mean("objective/kl", trained_kl(rows, policy, reference))


def _record_policy(store: MetricStore, rows: PackedRows, policy: RowLogprobs) -> None:
    real_N, used_S = rows.weight_N > 0, _own_completions(rows)
    own_M = rows.by_policy_S.repeat_interleave(rows.length_S)
    logps_S = policy.logps_S.detach()
    store.mean("logps/chosen", logps_S[rows.chosen_N[real_N]])
    store.mean("logps/rejected", logps_S[rows.rejected_N[real_N]])
    store.mean("objective/entropy", -logps_S[used_S])
    store.mean("objective/token_entropy", policy.entropy_M[own_M])
    gap_M = (policy.token_logps_M.detach() - rows.sampled_logps_M)[own_M].abs()
    store.mean("sampling/sampling_logp_difference/mean", gap_M)
    store.largest("sampling/sampling_logp_difference/max", gap_M)


def _record_rewards(store: MetricStore, rows: PackedRows, rewards_S: torch.Tensor) -> None:
    """Records what is relative to the reference; ``rewards_S`` are DPO's implicit rewards."""
    real_N, used_S = rows.weight_N > 0, _own_completions(rows)
    chosen_N, rejected_N = rewards_S[rows.chosen_N[real_N]], rewards_S[rows.rejected_N[real_N]]
    margin_N = chosen_N - rejected_N
    store.mean("rewards/chosen", chosen_N)
    store.mean("rewards/rejected", rejected_N)
    store.mean("rewards/margins", margin_N)
    store.mean("rewards/accuracies", (margin_N > 0).double())
    store.mean("objective/non_score_reward", -rewards_S[used_S])
    scored_S = used_S[~rows.score_S[used_S].isnan()]  # all of them, or with a judge alone none
    store.mean("objective/trained_scores", rows.score_S[scored_S])
    store.mean("objective/rlhf_reward", rows.score_S[scored_S] - rewards_S[scored_S])


def trained_kl(rows: PackedRows, policy: RowLogprobs, reference: RowLogprobs) -> torch.Tensor:
    """Returns the log-ratio of each completion of the policy that is trained on; ``objective/kl`` is their mean."""
    return (policy.logps_S.detach() - reference.logps_S)[_own_completions(rows)]


def _own_completions(rows: PackedRows) -> torch.Tensor:
    """The completions that the policy wrote and that stand in pairs, each once, as indices."""
    real_N = rows.weight_N > 0
    used_S = torch.cat([rows.chosen_N[real_N], rows.rejected_N[real_N]]).unique()
    return used_S[rows.by_policy_S[used_S]]


def _record_comparisons(store: MetricStore, assessment: Verdicts) -> None:
    store.total("judge/duels", assessment.duels)
    store.ratio("judge/unanswered_ratio", assessment.unanswered, assessment.duels)


def _has_opponent(pair: Pair) -> bool:
    return pair.chosen_completion.by_policy != pair.rejected_completion.by_policy


def _probability_against_opponent(pair: Pair) -> float:
    return pair.probability if pair.chosen_completion.by_policy else 1 - pair.probability


def _length_gap(chosen: Completion, rejected: Completion) -> float:
    return float(len(chosen.token_ids) - len(rejected.token_ids))


def _present(values: list[list[float | None]], groups: list[Group], by_policy: bool = True) -> list[float]:
    """The scores that there are of the completions that the policy, or its opponent, wrote."""
    return [
        value
        for row, group in zip(values, groups, strict=True)
        for value, completion in zip(row, group.completions, strict=True)
        if value is not None and completion.by_policy == by_policy
    ]
