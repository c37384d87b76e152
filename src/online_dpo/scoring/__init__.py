"""Scorers: they turn groups of completions into scores (rewards) or preference probabilities (judges).

A name is imported from its module on first access, so that importing one scorer does not load all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from online_dpo.scoring.judge_registry import build_judge, check_judge, judge, pairwise_scorer
    from online_dpo.scoring.judges.adapters import FunctionJudge, JudgeScorer
    from online_dpo.scoring.judges.base import Judge
    from online_dpo.scoring.judges.human import HumanJudge
    from online_dpo.scoring.judges.llm.judge import LLMJudge, check_share
    from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
    from online_dpo.scoring.judges.top_k import judge_the_top
    from online_dpo.scoring.judges.tournament import ComparisonCounter, find_preferences
    from online_dpo.scoring.notes import nothing_noted, noting
    from online_dpo.scoring.penalties import Penalties
    from online_dpo.scoring.protocols import AsyncPointwiseScorer, CountingScorer, PairwiseScorer, PointwiseScorer
    from online_dpo.scoring.registry import (
        RewardFunc,
        build_scorers,
        check_reward_columns,
        check_reward_path,
        check_scorers,
        reward,
    )
    from online_dpo.scoring.rewards.combine import score_groups
    from online_dpo.scoring.rewards.function import FunctionScorer
    from online_dpo.scoring.rewards.http import HTTPReward
    from online_dpo.scoring.rewards.loading import load_reward_model
    from online_dpo.scoring.rewards.model import RewardModelScorer

__all__ = [
    "AsyncPointwiseScorer",
    "CountingScorer",
    "ComparisonCounter",
    "FunctionJudge",
    "FunctionScorer",
    "HTTPReward",
    "HumanJudge",
    "Judge",
    "JudgeScorer",
    "LLMJudge",
    "PairwiseModelJudge",
    "PairwiseScorer",
    "Penalties",
    "PointwiseScorer",
    "RewardFunc",
    "RewardModelScorer",
    "build_judge",
    "build_scorers",
    "check_judge",
    "check_reward_columns",
    "check_reward_path",
    "check_scorers",
    "check_share",
    "find_preferences",
    "judge",
    "judge_the_top",
    "load_reward_model",
    "nothing_noted",
    "noting",
    "pairwise_scorer",
    "reward",
    "score_groups",
]

_HOMES = {
    "AsyncPointwiseScorer": "online_dpo.scoring.protocols",
    "CountingScorer": "online_dpo.scoring.protocols",
    "ComparisonCounter": "online_dpo.scoring.judges.tournament",
    "FunctionJudge": "online_dpo.scoring.judges.adapters",
    "FunctionScorer": "online_dpo.scoring.rewards.function",
    "HTTPReward": "online_dpo.scoring.rewards.http",
    "HumanJudge": "online_dpo.scoring.judges.human",
    "Judge": "online_dpo.scoring.judges.base",
    "JudgeScorer": "online_dpo.scoring.judges.adapters",
    "LLMJudge": "online_dpo.scoring.judges.llm.judge",
    "PairwiseModelJudge": "online_dpo.scoring.judges.pairwise.judge",
    "PairwiseScorer": "online_dpo.scoring.protocols",
    "Penalties": "online_dpo.scoring.penalties",
    "PointwiseScorer": "online_dpo.scoring.protocols",
    "RewardFunc": "online_dpo.scoring.registry",
    "RewardModelScorer": "online_dpo.scoring.rewards.model",
    "build_judge": "online_dpo.scoring.judge_registry",
    "build_scorers": "online_dpo.scoring.registry",
    "check_judge": "online_dpo.scoring.judge_registry",
    "check_reward_columns": "online_dpo.scoring.registry",
    "check_reward_path": "online_dpo.scoring.registry",
    "check_scorers": "online_dpo.scoring.registry",
    "check_share": "online_dpo.scoring.judges.llm.judge",
    "find_preferences": "online_dpo.scoring.judges.tournament",
    "judge": "online_dpo.scoring.judge_registry",
    "judge_the_top": "online_dpo.scoring.judges.top_k",
    "load_reward_model": "online_dpo.scoring.rewards.loading",
    "nothing_noted": "online_dpo.scoring.notes",
    "noting": "online_dpo.scoring.notes",
    "pairwise_scorer": "online_dpo.scoring.judge_registry",
    "reward": "online_dpo.scoring.registry",
    "score_groups": "online_dpo.scoring.rewards.combine",
}


_FORMER_NAMES = {"DuelCounter": "ComparisonCounter"}


def __getattr__(name: str) -> Any:
    name = _FORMER_NAMES.get(name, name)
    if name not in _HOMES:
        raise AttributeError(f"module 'online_dpo.scoring' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
