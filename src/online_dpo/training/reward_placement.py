"""Where reward models lie on several processes: whole on each, or in parts as the policy does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.sharding import Sharding
from online_dpo.scoring.assess import AssessmentOptions, Assessor
from online_dpo.scoring.protocols import PairwiseScorer, PointwiseScorer
from online_dpo.scoring.rewards.model import RewardModelScorer


def build_assessor(
    scorers: Sequence[PointwiseScorer], judge: PairwiseScorer | None, args: OnlineDPOConfig, sharding: Sharding
) -> Assessor:
    """Returns the assessor of training and evaluations. Reward models are sharded if the configuration asks for it."""
    models = shard_rewards(scorers, sharding) if args.reward_model_sharding == "shard" else []
    return Assessor(scorers, judge, lambda: AssessmentOptions.from_config(args), models)


def shard_rewards(scorers: Sequence[Any], sharding: Sharding) -> list[nn.Module]:
    """Shards the reward models among these scorers in place, as the policy will be, and returns them.

    Raises:
        ValueError: the policy's weights will not lie in parts, or none of the scorers is a reward model.
    """
    if not sharding.partial:
        raise ValueError(
            '`reward_model_sharding="shard"` puts parts of reward models beside parts of the policy, which is whole on '
            "each process here. Use `fsdp: true` or ZeRO-3, or leave it out."
        )
    models = list(dict.fromkeys(scorer.model for scorer in scorers if isinstance(scorer, RewardModelScorer)))
    if not models:
        raise ValueError('`reward_model_sharding="shard"`: there is no reward model to shard. Leave it out.')
    for model in models:
        model.requires_grad_(False)
        sharding.shard_frozen(model)
    return models
