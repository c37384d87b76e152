"""Preference losses: pure functions of log-probabilities, one value a pair, and their registry.

A new loss is one function with ``@loss`` above it; one of this package has its name in `config.loss.LossType` as well.

Notation: ``w`` is the chosen completion and ``l`` the rejected one; ``r(y) = beta (log pi(y) - log pi_ref(y))`` is the
implicit reward; ``h = (log pi(w) - log pi(l)) - (log pi_ref(w) - log pi_ref(l))``; ``s`` is the sigmoid; ``|y|`` is a
completion's number of tokens. Log-probabilities of completions are sums over their tokens.

A label may be uncertain: with probability ``p`` the chosen completion is the better one. A loss is then an expectation:
``p * loss(w, l) + (1 - p) * loss(l, w)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from online_dpo.config.registry import Registry
from online_dpo.objective.inputs import LossOptions, PairLogprobs

PairLoss = Callable[[PairLogprobs, LossOptions], torch.Tensor]
"""A function from the log-probabilities of N pairs to their losses, (N,)."""

LOSSES: Registry[PairLoss] = Registry("loss")


def loss(name: str) -> Callable[[PairLoss], PairLoss]:
    """Registers a loss; ``loss_type: name`` in a configuration then selects it.

    >>> @loss("mine")
    ... def mine(pairs, options): return -F.logsigmoid(options.beta * pairs.h_N)

    Raises:
        RegistryError: the name is taken.
    """
    return LOSSES.decorator(name, lambda function: function)


@loss("sigmoid")
def sigmoid_loss(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """DPO: ``-log s(beta h)`` (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    With uncertain labels conservative DPO: ``-p log s(beta h) - (1 - p) log s(-beta h)``.
    """
    return _expected(lambda x: -F.logsigmoid(options.beta * x.h_N), pairs, _smoothed(pairs, options))


@loss("ipo")
def ipo_loss(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """IPO: ``(h - 1 / (2 tau))^2`` with tau = beta (Azar et al. 2023, arXiv 2310.12036, equation 17).

    ``h`` is the sum over tokens, as in the paper and in TRL's online trainer.
    """
    return _expected(lambda x: (x.h_N - 1 / (2 * options.beta)) ** 2, pairs, _smoothed(pairs, options))


@loss("hinge")
def hinge_loss(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """The hinge loss of SLiC, ``max(0, 1 - beta h)`` (Zhao et al. 2023, arXiv 2305.10425).

    It is the paper's ``max(0, d - log pi(w) + log pi(l))`` with ``d = 1 / beta``, times beta, on log-probabilities
    relative to the reference.
    """
    return _expected(lambda x: F.relu(1 - options.beta * x.h_N), pairs, _smoothed(pairs, options))


@loss("robust")
def robust_loss(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """Robust DPO: ``((1 - e) L(w, l) - e L(l, w)) / (1 - 2 e)``, with ``L`` the loss of DPO and ``e`` the share of
    labels that are wrong, ``label_smoothing`` (Chowdhury et al. 2024, arXiv 2403.00409).

    Unlike with label smoothing, its expectation over wrong labels equals the loss of DPO on correct labels. It is DPO's
    expected loss with ``p = (1 - e) / (1 - 2 e)``, which is above 1.
    """
    error = options.label_smoothing
    probability_N = (pairs.probability_N - error) / (1 - 2 * error)
    return _expected(lambda x: -F.logsigmoid(options.beta * x.h_N), pairs, probability_N)


@loss("exo_pair")
def exo_pair_loss(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """EXO for pairs: ``KL(f || q)``, where ``f = (s(beta h), s(-beta h))`` is the preference that the policy implies
    and ``q = (p, 1 - p)`` the label, smoothed by ``label_smoothing`` (Ji et al. 2024, arXiv 2402.00856).

    This is the reverse of the divergence that DPO minimises. It is not finite if the label is certain.
    """
    label_N = _smoothed(pairs, options)
    x_N = options.beta * pairs.h_N
    better_N = torch.sigmoid(x_N) * (F.logsigmoid(x_N) - label_N.log())
    return better_N + torch.sigmoid(-x_N) * (F.logsigmoid(-x_N) - (1 - label_N).log())


@loss("simpo")
def simpo_loss(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """SimPO: ``-log s(beta log pi(w) / |w| - beta log pi(l) / |l| - gamma)``, without a reference (Meng et al. 2024,
    arXiv 2405.14734).
    """

    def certain(x: PairLogprobs) -> torch.Tensor:
        return -F.logsigmoid(options.beta * (x.mean_chosen_N - x.mean_rejected_N) - options.simpo_gamma)

    return _expected(certain, pairs, _smoothed(pairs, options))


@loss("sft")
def sft_loss(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """The negative log-likelihood of the chosen completion per token, ``-log pi(w) / |w|``; it ignores the label's
    probability.

    Added to another loss, it is the term of Pang et al. 2024 (arXiv 2404.19733).
    """
    return -pairs.mean_chosen_N


@loss("apo_zero")
def apo_zero_loss(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """APO-zero: ``(1 - s(r(w))) + s(r(l))``, which raises the reward of the chosen completion and lowers that of the
    rejected one (D'Oosterlinck et al. 2024, arXiv 2408.06266; the paper leaves out the constant 1).
    """

    def certain(x: PairLogprobs) -> torch.Tensor:
        return torch.sigmoid(-options.beta * x.chosen_ratio_N) + torch.sigmoid(options.beta * x.rejected_ratio_N)

    return _expected(certain, pairs, _smoothed(pairs, options))


@loss("apo_down")
def apo_down_loss(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """APO-down: ``s(r(w)) + (1 - s(r(w) - r(l)))``, which lowers both rewards, that of the rejected completion more
    (arXiv 2408.06266, which leaves out the constant 1).
    """

    def certain(x: PairLogprobs) -> torch.Tensor:
        return torch.sigmoid(options.beta * x.chosen_ratio_N) + torch.sigmoid(-options.beta * x.h_N)

    return _expected(certain, pairs, _smoothed(pairs, options))


@loss("dpop")
def dpop_loss(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """DPO-positive: ``-log s(beta (h - lambda max(0, log pi_ref(w) - log pi(w))))`` (Pal et al. 2024, arXiv
    2402.13228), with a penalty if the chosen completion is less likely under the policy than under the reference.
    """

    def certain(x: PairLogprobs) -> torch.Tensor:
        return -F.logsigmoid(options.beta * (x.h_N - options.dpop_lambda * F.relu(-x.chosen_ratio_N)))

    return _expected(certain, pairs, _smoothed(pairs, options))


def pair_losses(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """The weighted sum of the losses that ``options`` name, (N,), times the pairs' weights with ``use_weighting``."""
    losses = [weight * LOSSES[name](pairs, options) for name, weight in options.terms]
    total_N = torch.stack(losses).sum(dim=0)
    return total_N * policy_weights(pairs) if options.use_weighting else total_N


def policy_weights(pairs: PairLogprobs) -> torch.Tensor:
    """The weights of WPO, ``pi(w)^(1/|w|) * pi(l)^(1/|l|)``, without gradient: pairs count more the likelier they are
    under the current policy (Zhou et al. 2024, arXiv 2406.11827).
    """
    return (pairs.mean_chosen_N + pairs.mean_rejected_N).detach().exp()


def _expected(
    certain: Callable[[PairLogprobs], torch.Tensor], pairs: PairLogprobs, probability_N: torch.Tensor
) -> torch.Tensor:
    """The expected loss, if the chosen completion is the better one with this probability."""
    return probability_N * certain(pairs) + (1 - probability_N) * certain(pairs.exchanged())


def _smoothed(pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
    """The probability of the label if a share ``e`` of the labels is wrong: ``p (1 - e) + (1 - p) e``."""
    return pairs.probability_N + options.label_smoothing * (1 - 2 * pairs.probability_N)
