"""The inputs of a loss: the log-probabilities of pairs, and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.types import PackedRows, RowLogprobs


@dataclass(frozen=True)
class PairLogprobs:
    """The log-probabilities of N pairs under policy and reference, and what else a loss needs; all fields are (N,).

    Log-probabilities are in nats, summed over the tokens of a completion; lengths are in tokens. ``probability_N`` is
    the probability that the chosen completion is the better one. ``..._by_policy_N`` (bool) tells whether the policy
    wrote the completion, or its opponent.
    """

    chosen_N: torch.Tensor
    rejected_N: torch.Tensor
    ref_chosen_N: torch.Tensor
    ref_rejected_N: torch.Tensor
    chosen_length_N: torch.Tensor
    rejected_length_N: torch.Tensor
    probability_N: torch.Tensor
    chosen_by_policy_N: torch.Tensor
    rejected_by_policy_N: torch.Tensor

    @property
    def chosen_ratio_N(self) -> torch.Tensor:
        """``log pi(w) - log pi_ref(w)``."""
        return self.chosen_N - self.ref_chosen_N

    @property
    def rejected_ratio_N(self) -> torch.Tensor:
        """``log pi(l) - log pi_ref(l)``."""
        return self.rejected_N - self.ref_rejected_N

    @property
    def h_N(self) -> torch.Tensor:
        """``(log pi(w) - log pi(l)) - (log pi_ref(w) - log pi_ref(l))``: the logit of DPO, without beta."""
        return (self.chosen_N - self.rejected_N) - (self.ref_chosen_N - self.ref_rejected_N)

    @property
    def mean_chosen_N(self) -> torch.Tensor:
        """``log pi(w) / |w|``."""
        return self.chosen_N / self.chosen_length_N

    @property
    def mean_rejected_N(self) -> torch.Tensor:
        """``log pi(l) / |l|``."""
        return self.rejected_N / self.rejected_length_N

    def exchanged(self) -> PairLogprobs:
        """The pairs with chosen and rejected completions exchanged, and the complementary probabilities."""
        return PairLogprobs(
            self.rejected_N,
            self.chosen_N,
            self.ref_rejected_N,
            self.ref_chosen_N,
            self.rejected_length_N,
            self.chosen_length_N,
            1 - self.probability_N,
            self.rejected_by_policy_N,
            self.chosen_by_policy_N,
        )


@dataclass(frozen=True)
class LossOptions:
    """The loss: a weighted sum of the losses named in ``terms``, and what they need to know. ``own`` has the fields
    that the run's method alone reads, as they are now.

    >>> LossOptions(terms=(("sigmoid", 1.0), ("sft", 0.2)), beta=0.1)
    """

    terms: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    dpop_lambda: float = 50.0
    use_weighting: bool = False
    own: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_config(cls, args: OnlineDPOConfig) -> LossOptions:
        """With the beta of the first epoch, and without the method's options; see `now`."""
        names = args.loss_types
        weights = args.loss_weights or [1.0] * len(names)
        return cls(
            terms=tuple(zip(names, weights, strict=True)),
            beta=args.beta_at(0),
            label_smoothing=args.label_smoothing,
            simpo_gamma=args.simpo_gamma,
            dpop_lambda=args.dpop_lambda,
            use_weighting=args.use_weighting,
        )

    def now(self, beta: float, own: Mapping[str, float]) -> LossOptions:
        """With this beta and these options of the method."""
        return replace(self, beta=beta, own=own)


def pair_logprobs(rows: PackedRows, policy: RowLogprobs, reference: RowLogprobs | None) -> PairLogprobs:
    """The log-probabilities of the pairs in packed rows; without a reference, those of the reference are nan."""
    chosen_N, rejected_N = rows.chosen_N, rows.rejected_N
    reference_S = torch.full_like(policy.logps_S, torch.nan) if reference is None else reference.logps_S
    return PairLogprobs(
        chosen_N=policy.logps_S[chosen_N],
        rejected_N=policy.logps_S[rejected_N],
        ref_chosen_N=reference_S[chosen_N],
        ref_rejected_N=reference_S[rejected_N],
        chosen_length_N=rows.length_S[chosen_N],
        rejected_length_N=rows.length_S[rejected_N],
        probability_N=rows.probability_N,
        chosen_by_policy_N=rows.by_policy_S[chosen_N],
        rejected_by_policy_N=rows.by_policy_S[rejected_N],
    )
