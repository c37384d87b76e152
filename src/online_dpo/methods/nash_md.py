"""Nash-MD (Munos et al. 2023, arXiv 2312.00886): the policy plays a mixture of itself and the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.config.sampling import SAMPLING_FIELDS
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.methods.base import Method, check_one_opponent, method
from online_dpo.modeling.reference import Reference
from online_dpo.objective.inputs import LossOptions, PairLogprobs
from online_dpo.pairing.select import MISSING_SCORE, NO_ANSWER, Draw, Selection
from online_dpo.rollout.builtin.mixture import MixtureEngine
from online_dpo.rollout.opponent import ModelOpponent, Opponent
from online_dpo.stats.preference import sigmoid
from online_dpo.types import Group, Pair, Pairing, Scores, Verdicts

NEEDS = (
    ("loss_type", "sigmoid", "its loss is a policy gradient"),
    ("loss_weights", None, "its loss is a policy gradient"),
    ("label_smoothing", 0.0, "its loss is a policy gradient"),
    ("use_weighting", False, "its loss is a policy gradient"),
    ("tie_policy", "skip", "a tie is a probability of one half, and is trained as that"),
    ("min_margin", None, "a policy gradient without some of the pairs would be biased"),
    ("max_margin", None, "a policy gradient without some of the pairs would be biased"),
    ("max_length_ratio", None, "a policy gradient without some of the pairs would be biased"),
    ("margin_weighting", False, "a policy gradient with weights would be biased"),
    ("resample_rounds", 0, "a policy gradient of completions picked by their scores would be biased"),
    ("max_staleness", 0, "a policy gradient needs completions of the present policy"),
    ("use_vllm", False, "vLLM cannot sample from a mixture of two models"),
    ("cache_implementation", None, "a mixture of two models is not sampled by `generate`"),
)
"""Fields that must have one value, that value, and why."""
GENERATION = (*SAMPLING_FIELDS, "stop_strings", "eos_token_id")
UNCHANGED: dict[str, Any] = dict(temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0)
"""Sampling from the model's own distribution."""


@method("nash_md")
class NashMD(Method):
    """One completion of the policy and one of the mixture; a policy gradient raises the chance to be preferred."""

    epoch_fields = ("mixture_coef",)
    needs_reference = True

    def check(self, args: OnlineDPOConfig) -> None:
        """Refuse what would bias the gradient, or what a mixture of two models cannot do.

        Raises:
            ValueError: a field contradicts the method. Sampling from another distribution gives a warning.
        """
        check_one_opponent(args)
        for name, needed, reason in NEEDS:
            if getattr(args, name) != needed:
                raise ValueError(f"`method='nash_md'` needs `{name}` to be {needed!r}: {reason}.")
        given: dict[str, Any] = {**(args.generation_kwargs or {})}  # pyright: ignore[reportGeneralTypeIssues]
        for name in given:
            if name not in GENERATION:
                raise ValueError(
                    f"`generation_kwargs` must not hold `{name}` with `method='nash_md'`: a mixture of two models is "
                    f"not sampled by `generate`. It knows {', '.join(GENERATION)}."
                )
        changed = [name for name, value in UNCHANGED.items() if given.get(name, getattr(args, name)) != value]
        if changed:
            warnings.warn(
                "`method='nash_md'` is a policy gradient, which takes completions for samples of the policy's own "
                f"distribution. Set {', '.join(f'`{name}` to {UNCHANGED[name]}' for name in changed)}.",
                stacklevel=5,
            )

    def build_opponent(
        self,
        policy: nn.Module,
        reference: Reference,
        tokenizer: PreTrainedTokenizerBase,
        args: OnlineDPOConfig,
        epoch: Callable[[], float],
    ) -> Opponent:
        """The mixture, with the reference's share of the present epoch.

        Raises:
            ValueError: policy and reference cannot be mixed.
        """

        def share() -> float:
            return args.at_epoch("mixture_coef", epoch())

        engine = MixtureEngine(policy, reference.active, share, tokenizer, args.rollout_batch_size)
        return ModelOpponent(engine, "mixture")

    def form_pairs(
        self, groups: Sequence[Group], assessment: Scores | Verdicts, selection: Selection, draw: Draw
    ) -> Pairing:
        """Forms a pair of every group that has scores or an answer: part of the loss does not depend on who wins."""
        return pairs_of_two(groups, assessment, selection.label_temperature or 1.0)

    def losses(self, pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
        """Nash-MD-PG: ``-(P(y > y') - 1/2 - beta log(pi(y) / pi_ref(y))) log pi(y)``, where the policy wrote ``y`` and
        its opponent ``y'``, and no gradient flows into the bracket (section 7: the regularised policy gradient, with
        beta as its tau).

        In expectation its gradient is that of ``beta KL(pi, pi_ref) - P(pi > opponent)``; its value means nothing. One
        half is a baseline. Where the policy wrote both completions (in evaluation), it is the mean over both.
        """

        def loss(y: PairLogprobs) -> torch.Tensor:
            """As if the policy had written the chosen completions."""
            advantage_N = y.probability_N - 0.5 - options.beta * y.chosen_ratio_N
            return torch.where(y.chosen_by_policy_N, -advantage_N.detach() * y.chosen_N, 0.0)

        written_N = pairs.chosen_by_policy_N.float() + pairs.rejected_by_policy_N.float()
        return (loss(pairs) + loss(pairs.exchanged())) / written_N.clamp(min=1.0)


def pairs_of_two(groups: Sequence[Group], assessment: Scores | Verdicts, temperature: float = 1.0) -> Pairing:
    """Forms a pair with a probability of every group of two that has scores or an answer.

    With scores the probability is the sigmoid of their difference over ``temperature`` (Bradley-Terry), with a judge
    the judge's. Ties, and completions with the same tokens, are even. Without both scores, or an answer, a group is
    dropped as ``missing_score`` or ``no_answer``.
    """
    pairing = Pairing()
    for p, group in enumerate(groups):
        scores = assessment.values[p] if isinstance(assessment, Scores) else [None, None]
        probability = _first_is_better(assessment, p, temperature)
        if probability is None:
            pairing.drop(p, MISSING_SCORE if isinstance(assessment, Scores) else NO_ANSWER)
            continue
        if len({completion.token_ids for completion in group.completions}) == 1:
            probability = 0.5
        chosen, rejected = (0, 1) if probability >= 0.5 else (1, 0)
        pairing.pairs.append(
            Pair(group, chosen, rejected, scores[chosen], scores[rejected], max(probability, 1 - probability))
        )
    return pairing


def _first_is_better(assessment: Scores | Verdicts, p: int, temperature: float) -> float | None:
    """The probability that the first completion of group ``p`` is better than the second."""
    if isinstance(assessment, Verdicts):
        preference = assessment.preferences[p]
        if preference is None:
            return None
        return preference.probability if preference.chosen == 0 else 1 - preference.probability
    first, second = assessment.ranking[p]
    if first is None or second is None:
        return None
    return sigmoid((first - second) / temperature)
