"""How many tokens a pass may have in the memory that is free. An estimate; the tests compare it with the peaks of whole
passes of Qwen2.5's 0.5B and 1.5B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from online_dpo.sizing.held import FP32, HALF
from online_dpo.sizing.passing import hidden_bytes, layer_once, of_a_pass
from online_dpo.sizing.plan import Plan
from online_dpo.sizing.shape import KNOWN, ModelShape, shape_of

SHARE = 0.9
"""Part of the free memory that is given away. The rest is for what the allocator cannot use, workspaces of kernels, and
errors of the estimate."""
STEP = 64
"""Numbers of tokens are multiples of this."""


def pass_bytes(plan: Plan, width: int) -> int:
    """Bytes of a forward and backward pass with ``plan.tokens_per_pass`` tokens, padding included, beside weights,
    gradients and the optimizer's state.

    Args:
        width: tokens of a row, as many as its mask has columns.
    """
    shape, tokens, size = plan.policy, plan.tokens_per_pass, plan.compute_bytes
    terms = {term.name: term.gpu for term in of_a_pass(plan)}
    # attention with a mask reads keys and values that are copied for each of the query heads
    repeated = 2 * size * tokens * (shape.heads * shape.head_dim - shape.kv_width)
    mask = size * tokens * width
    # autocast keeps what it has cast of the weights until the forward pass is over, and a backward pass reads it
    linears = sum(weight.numbers * weight.count for weight in shape.weights() if weight.linear)
    casts = HALF * linears if plan.bf16 and hidden_bytes(plan) == FP32 else 0
    once = layer_once(shape, tokens, size)
    backward = once + 2 * FP32 * tokens * shape.hidden
    always = terms["buckets"] + terms["gathered for a pass"] + mask
    if not plan.gradient_checkpointing:
        return always + terms["activations"] + shape.layers * repeated + casts + terms["logits"] + backward
    inputs = shape.layers * tokens * shape.hidden * hidden_bytes(plan)
    forward = casts + max(once, terms["logits"])
    return always + inputs + max(forward, terms["activations"] - inputs + repeated + backward)


def tokens_that_fit(plan: Plan, free: int, width: int, padding: float, most: int) -> int:
    """The most tokens of a pass, without padding, that take `SHARE` of the free memory; `STEP` if not even those do.

    Args:
        plan: the run; its ``tokens_per_pass`` is not read.
        free: bytes that a pass can have, beside all that stays.
        padding: tokens with padding for each without.
    """
    tokens = most
    while tokens > STEP and pass_bytes(replace(plan, tokens_per_pass=int(padding * tokens)), width) > SHARE * free:
        tokens = max(STEP, (tokens - 1) // STEP * STEP)
    return tokens


def shape_like(config: Mapping[str, Any], parameters: int) -> ModelShape:
    """The shape of a model; of a kind that `shape_of` does not know, that of a model with gated MLPs which has as many
    weights in as many layers. A mixture of experts counts as if all of them were asked.

    Args:
        config: the content of the text model's ``config.json``, under the names that all of transformers' configs have.
        parameters: numbers in all weights.
    """
    if config["model_type"] in KNOWN:
        return shape_of(config)
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config.get("num_attention_heads") or 1
    vocabulary, tied = config["vocab_size"], bool(config.get("tie_word_embeddings"))
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    of_layer = (parameters - vocabulary * hidden * (1 if tied else 2)) // layers
    intermediate = max(hidden, (of_layer - attention) // (3 * hidden))
    return ModelShape(hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary, tied)
