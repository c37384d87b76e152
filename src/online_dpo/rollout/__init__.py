"""Sampling completions: prompts to groups."""

from online_dpo.rollout.engine import Engine, RolloutKey, SamplingParams, Stream
from online_dpo.rollout.transformers_engine import TransformersEngine

__all__ = ["Engine", "RolloutKey", "SamplingParams", "Stream", "TransformersEngine"]
