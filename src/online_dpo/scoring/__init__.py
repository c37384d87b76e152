"""Scoring: groups in, a number for each completion (or a rank for each pair) out."""

from online_dpo.scoring.combine import RewardFunc, build_scorers, check_scorers, score_groups
from online_dpo.scoring.functions import FunctionScorer
from online_dpo.scoring.judge import Judge, JudgeScorer
from online_dpo.scoring.reward_model import RewardModelScorer, load_reward_model
from online_dpo.scoring.scorer import AsyncPointwiseScorer, PairwiseScorer, PointwiseScorer
from online_dpo.scoring.tournament import DuelCounter, find_preferences

__all__ = [
    "AsyncPointwiseScorer",
    "DuelCounter",
    "FunctionScorer",
    "Judge",
    "JudgeScorer",
    "PairwiseScorer",
    "PointwiseScorer",
    "RewardFunc",
    "RewardModelScorer",
    "build_scorers",
    "check_scorers",
    "find_preferences",
    "load_reward_model",
    "score_groups",
]
