"""Models whose layers have different windows, and groups of several lengths to read through them."""

import random

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from support import tiny


def mixed_model(seed=0, **overrides):
    """A tiny Gemma 3: sliding windows and full attention in turn, keys shared by heads."""
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **{
            "vocab_size": tiny.VOCABULARY,
            "num_hidden_layers": 2,
            "layer_types": kinds,
            "sliding_window": 8,
            "max_position_embeddings": 2048,
            **shape,
            **overrides,
        }
    )
    return Gemma3ForCausalLM(config).eval()


def random_groups(lengths, longest=60, completions=3, seed=0):
    """One group for each prompt length."""
    draw = random.Random(seed)
    return [
        tiny.group(
            prompt, [[draw.randrange(3, 40) for _ in range(draw.randrange(1, longest))] for _ in range(completions)]
        )
        for prompt in tiny.prompts(lengths)
    ]
