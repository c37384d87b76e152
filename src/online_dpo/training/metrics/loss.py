"""Records the results of the forward passes: the loss, and what policy and reference say of the completions."""

from __future__ import annotations

import torch

from online_dpo.stats.catalogue import Metric, describe
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.kl_by_position import record_kl_by_position
from online_dpo.types import PackedRows, RowLogprobs

STEP_KL = "step/kl"
"""Collected for the step alone, see `MetricStore.take_mean`."""
REFERENCE = "with a reference"

describe(
    "Loss and objective",
    Metric(
        "loss",
        "nats",
        "mean loss of the pairs, each counted once",
        "With sigmoid DPO 0.693 is a policy that prefers neither. It says little about quality.",
    ),
    Metric("beta", "1", "beta of the loss", "What it is now, with a schedule or `target_kl`."),
    Metric(
        "objective/kl",
        "nats",
        "mean over trained completions of the log-ratio to the reference, summed over the completion",
        "How far the policy has gone. Scores that rise only with much KL are often exploits of the reward.",
        when=REFERENCE,
    ),
    Metric(
        "objective/entropy",
        "nats",
        "mean over trained completions of minus their log-probability",
        "Falls as the policy becomes sure of whole answers.",
    ),
    Metric(
        "objective/token_entropy",
        "nats",
        "mean over the tokens of trained completions of the entropy of the next-token distribution",
        "Near 0, sampling gives the same answers again, and no pairs.",
    ),
    Metric(
        "objective/trained_scores",
        "score",
        "mean score of the completions that are trained on",
        "Beside `objective/scores`, which is of all.",
        when="with a reward",
    ),
    Metric(
        "objective/non_score_reward",
        "score",
        "-beta times the mean log-ratio of trained completions",
        "The price of the KL in the RLHF objective.",
        when=REFERENCE,
    ),
    Metric(
        "objective/rlhf_reward",
        "score",
        "`objective/trained_scores` plus `objective/non_score_reward`",
        "What RLHF maximises: the score less the price of the KL.",
        when="with a reward and a reference",
    ),
)
describe(
    "Implicit rewards",
    Metric(
        "rewards/chosen",
        "nats",
        "mean over pairs of beta times the chosen completion's log-ratio",
        "Falling: the policy leaves good answers too, only slower.",
        REFERENCE,
    ),
    Metric(
        "rewards/rejected",
        "nats",
        "mean over pairs of beta times the rejected completion's log-ratio",
        "Usually falls.",
        REFERENCE,
    ),
    Metric(
        "rewards/margins",
        "nats",
        "`rewards/chosen` minus `rewards/rejected`",
        "How strongly the policy already agrees with the labels.",
        REFERENCE,
    ),
    Metric(
        "rewards/accuracies",
        "share",
        "pairs whose margin is above 0 / pairs",
        "How often the policy agrees with the label. On policy it stays near one half for long.",
        REFERENCE,
    ),
    Metric(
        "logps/chosen",
        "nats",
        "mean over pairs of the chosen completion's log-probability",
        "Falling together with `logps/rejected`: probability goes to answers that are in no pair.",
    ),
    Metric("logps/rejected", "nats", "mean over pairs of the rejected completion's log-probability", "The same."),
)
describe(
    "Sampling",
    Metric(
        "sampling/sampling_logp_difference/mean",
        "nats",
        "mean over the tokens of trained completions of |log-probability by the trainer - by the sampler|",
        "How exactly the engine samples from the policy. With bf16 some 0.01 is usual.",
    ),
    Metric(
        "sampling/sampling_logp_difference/max",
        "nats",
        "the largest such difference",
        "Large single values are usual in bf16; a rising mean is a sampler with other weights.",
    ),
    Metric(
        "sampling/staleness",
        "steps",
        "mean over completions of the trainer's step minus the policy version that wrote them",
        "How old training data are: 0, or up to `max_staleness`.",
    ),
)


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
        ratio_M = policy.token_logps_M.detach() - reference.token_logps_M
        record_kl_by_position(store, rows, ratio_M, _own_completions(rows))


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
