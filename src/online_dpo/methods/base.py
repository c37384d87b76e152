"""The base class of methods: the policy's opponent, how pairs are formed, the loss, and checks of the configuration."""

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
    """An algorithm: its opponent, its pairs and its loss. This class is Online DPO; subclasses override what differs.

    ``epoch_fields`` are fields of the configuration that this method alone reads, each a number or one for each epoch.
    ``needs_reference``: its loss reads the reference whatever ``loss_type`` says.
    """

    name: ClassVar[str]
    epoch_fields: ClassVar[tuple[str, ...]] = ()
    needs_reference: ClassVar[bool] = False

    def check(self, args: OnlineDPOConfig) -> None:
        """Checks the configuration; this class accepts any.

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
        """Returns the opponent, which adds its completions to those of the policy; here there is none.

        Args:
            epoch: returns the present epoch, which may be fractional.

        Raises:
            ValueError: the models cannot be used in that way.
        """
        return SelfPlay()

    def form_pairs(
        self, groups: Sequence[Group], assessment: Scores | Verdicts, selection: Selection, draw: Draw
    ) -> Pairing:
        """Forms pairs; every group ends in pairs or in one counted reason.

        Args:
            draw: the source of random choices.
        """
        if isinstance(assessment, Verdicts):
            return pairs_from_preferences(groups, assessment.preferences, selection, assessment.scores)
        return pairs_from_scores(groups, assessment, selection, draw)

    def losses(self, pairs: PairLogprobs, options: LossOptions) -> torch.Tensor:
        """Returns the loss of each pair, (N,): here by ``loss_type``. A pure function.

        ``options.own`` holds `epoch_options`.
        """
        return pair_losses(pairs, options)

    def epoch_options(self, args: OnlineDPOConfig, epoch: float) -> dict[str, float]:
        """The values of ``epoch_fields`` in an epoch."""
        return {name: args.at_epoch(name, epoch) for name in self.epoch_fields}


MethodClass = TypeVar("MethodClass", bound=type[Method])


def method(name: str) -> Callable[[MethodClass], MethodClass]:
    """Registers a subclass of `Method`: ``method: name`` in a configuration then chooses it.

    >>> @method("my_method")
    ... class MyMethod(Method): ...

    Raises:
        RegistryError: the name is taken.
    """

    def named(cls: type[Method]) -> Method:
        cls.name = name
        return cls()

    return METHODS.decorator(name, named)


def check_one_opponent(args: OnlineDPOConfig) -> None:
    """Checks the fields of a method whose opponent needs the reference and adds one completion to one of the policy.

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
