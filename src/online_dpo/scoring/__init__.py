"""Scoring: groups in, a number for each completion (or a preference for each pair) out.

Names are loaded when they are asked for, so that importing one scorer does not load them all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from online_dpo.scoring.combine import (
        RewardFunc,
        build_scorers,
        check_reward_columns,
        check_reward_path,
        check_scorers,
        score_groups,
    )
    from online_dpo.scoring.functions import FunctionScorer
    from online_dpo.scoring.http_reward import HTTPReward
    from online_dpo.scoring.judge import FunctionJudge, Judge, JudgeScorer, check_judge, pairwise_scorer
    from online_dpo.scoring.llm_judge import LLMJudge, check_share
    from online_dpo.scoring.notes import nothing_noted, noting
    from online_dpo.scoring.pairwise_model import PairwiseModelJudge, build_judge
    from online_dpo.scoring.penalties import Penalties
    from online_dpo.scoring.reward_model import RewardModelScorer, load_reward_model
    from online_dpo.scoring.scorer import AsyncPointwiseScorer, CountingScorer, PairwiseScorer, PointwiseScorer
    from online_dpo.scoring.top_judge import judge_the_top
    from online_dpo.scoring.tournament import DuelCounter, find_preferences

__all__ = [
    "AsyncPointwiseScorer",
    "CountingScorer",
    "DuelCounter",
    "FunctionJudge",
    "FunctionScorer",
    "HTTPReward",
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
    "judge_the_top",
    "load_reward_model",
    "nothing_noted",
    "noting",
    "pairwise_scorer",
    "score_groups",
]

_HOMES = {
    "AsyncPointwiseScorer": "online_dpo.scoring.scorer",
    "CountingScorer": "online_dpo.scoring.scorer",
    "DuelCounter": "online_dpo.scoring.tournament",
    "FunctionJudge": "online_dpo.scoring.judge",
    "FunctionScorer": "online_dpo.scoring.functions",
    "HTTPReward": "online_dpo.scoring.http_reward",
    "Judge": "online_dpo.scoring.judge",
    "JudgeScorer": "online_dpo.scoring.judge",
    "LLMJudge": "online_dpo.scoring.llm_judge",
    "PairwiseModelJudge": "online_dpo.scoring.pairwise_model",
    "PairwiseScorer": "online_dpo.scoring.scorer",
    "Penalties": "online_dpo.scoring.penalties",
    "PointwiseScorer": "online_dpo.scoring.scorer",
    "RewardFunc": "online_dpo.scoring.combine",
    "RewardModelScorer": "online_dpo.scoring.reward_model",
    "build_judge": "online_dpo.scoring.pairwise_model",
    "build_scorers": "online_dpo.scoring.combine",
    "check_judge": "online_dpo.scoring.judge",
    "check_reward_columns": "online_dpo.scoring.combine",
    "check_reward_path": "online_dpo.scoring.combine",
    "check_scorers": "online_dpo.scoring.combine",
    "check_share": "online_dpo.scoring.llm_judge",
    "find_preferences": "online_dpo.scoring.tournament",
    "judge_the_top": "online_dpo.scoring.top_judge",
    "load_reward_model": "online_dpo.scoring.reward_model",
    "nothing_noted": "online_dpo.scoring.notes",
    "noting": "online_dpo.scoring.notes",
    "pairwise_scorer": "online_dpo.scoring.judge",
    "score_groups": "online_dpo.scoring.combine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'online_dpo.scoring' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value
