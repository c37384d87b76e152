"""What a method is: whom the policy plays against, which pairs that makes, what is minimised, and what it demands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.methods import METHODS
from online_dpo.modeling.reference import Reference
from online_dpo.objective.inputs import LossOptions, PairLogprobs
from online_dpo.objective.losses import pair_losses
from online_dpo.pairing.select import Draw, Selection, pairs_from_preferences, pairs_from_scores
from online_dpo.rollout.opponent import Opponent, SelfPlay
from online_dpo.types import Group, Pairing, Scores, Verdicts


class Method:
    """An algorithm, as this class itself is Online DPO: subclasses replace what they do in another way.

    ``epoch_fields`` are fields of the configuration that this method alone reads, each a number or one for each epoch.
    ``needs_reference``: its loss reads the reference whatever ``loss_type`` says.
    """

    name: ClassVar[str]
    epoch_fields: ClassVar[tuple[str, ...]] = ()
    needs_reference: ClassVar[bool] = False

    def check(self, args: OnlineDPOConfig) -> None:
        """What it demands of the configuration.

        Raises:
            ValueError: a field contradicts the method.
        """

    def build_opponent(
        self,
        policy: nn.Module,
        reference: Reference,
        tokenizer: PreTrainedTokenizerBase,
        args: OnlineDPOConfig,
        epoch: Callable[[], float],
    ) -> Opponent:
        """Whose completion the policy's is compared with; here only those of the policy are compared.

        Args:
            epoch: the present one, which may be fractional.

        Raises:
            ValueError: the models cannot be used in that way.
        """
        return SelfPlay()

    def form_pairs(
        self, groups: Sequence[Group], assessment: Scores | Verdicts, selection: Selection, draw: Draw
    ) -> Pairing:
        """The groups as pairs; every group ends in pairs or in one counted reason.

        Args:
            draw: where random choices come from.
        """
        if isinstance(assessment, Verdicts):
            return pairs_from_preferences(groups, assessment.preferences, selection, assessment.scores)
        return pairs_from_scores(groups, assessment, selection, draw)

    def losses(self, pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
        """What is minimised, one value a pair, (N,): here the losses of ``loss_type``. A pure function.

        ``options.own`` holds `epoch_options`.
        """
        return pair_losses(pairs, options)

    def epoch_options(self, args: OnlineDPOConfig, epoch: float) -> dict[str, float]:
        """The values of ``epoch_fields`` in an epoch."""
        return {name: args.at_epoch(name, epoch) for name in self.epoch_fields}


MethodClass = TypeVar("MethodClass", bound=type[Method])


def method(name: str) -> Callable[[MethodClass], MethodClass]:
    """Registers a subclass of `Method`: ``method: name`` in a configuration then chooses it.

    >>> @method("mine")
    ... class Mine(Method): ...

    Raises:
        RegistryError: the name is taken.
    """

    def named(cls: type[Method]) -> Method:
        cls.name = name
        return cls()

    return METHODS.decorator(name, named)


def check_one_opponent(args: OnlineDPOConfig) -> None:
    """For methods that compare one completion of the policy with one of an opponent that needs the reference.

    Raises:
        ValueError: the policy is to write several completions, or there is no reference.
    """
    if args.num_completions != 2:
        raise ValueError(
            f"`method={args.method!r}` compares one completion of the policy with one of its opponent: "
            f"`num_completions` must be 2; it is {args.num_completions}."
        )
    if args.judge_top is not None:
        raise ValueError(
            f"`judge_top` picks among several completions of the policy, and `method={args.method!r}` has one of them; "
            "leave it out."
        )
    if args.reference_free:
        raise ValueError(f"`method={args.method!r}` needs a reference; leave `reference_free` off.")
