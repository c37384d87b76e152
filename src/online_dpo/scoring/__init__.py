"""Scoring: groups in, a number for each completion (or a preference for each pair) out."""

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
