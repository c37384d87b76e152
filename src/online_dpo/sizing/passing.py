"""Bytes that come and go within a step: what is gathered, keys and values, activations, logits. Estimates.

Kernels, the allocator and the lengths of texts have their part. The tests compare each with what a small model
allocates on a CPU: what a layer keeps and the keys and values to the last byte, logits within 15 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from online_dpo.sizing.held import FP32, HALF, Term, gradient_term, stepped_numbers, trained_weights
from online_dpo.sizing.plan import Plan
from online_dpo.sizing.shape import ModelShape, Weight

CHUNK_LOGITS, CHUNK_LOGITS_ON_CPU = 2**28, 2**23
"""Logits that exist at a time on a GPU, and on a CPU: `modeling.logprobs.CHUNK_LOGITS_ELSEWHERE` and ``["cpu"]``."""
SEGMENTED = 384
"""Tokens of a row from which on a CPU reads it in segments: `modeling.attention.segments.SHORTEST`."""
ARRAYS_SAMPLING = 4
"""Arrays of logits in fp32 while a token is drawn: the logits, those with a temperature, their probabilities, sums."""
ARRAYS_FORWARD, ARRAYS_BACKWARD = 4.5, 2
"""Arrays of a chunk in fp32 at a time, on a CPU. Forward: the logits, their exponentials, those of the chunk before,
what the entropy sums, and half an array where products are in bf16. Backward: the logits, and their gradients in bf16.
"""


def sampling_terms(plan: Plan) -> Iterator[Term]:
    """Yields what sampling needs on the GPU, beside what is held."""
    if plan.engine == "servers":
        return
    if plan.engine == "vllm":
        yield Term("vLLM", int(plan.vllm_share * plan.gpu_bytes))
        return
    yield Term("gathered weights", _gathered_bytes(plan) if plan.parted else 0)
    yield Term("copies of linear layers", copied_bytes(plan))
    yield Term("packed linear layers", packed_bytes(plan))
    yield Term("keys and values", kv_bytes(plan))
    if plan.on_cpu:
        prompts = plan.sequences // plan.completions
        yield Term("prompts", layer_once(plan.policy, prompts * plan.prompt_tokens, plan.compute_bytes))
        yield Term("logits of a token", int(ARRAYS_SAMPLING * FP32 * plan.sequences * plan.policy.vocabulary))


def copied_bytes(plan: Plan) -> int:
    """The copies of linear layers that the built-in engine multiplies with on a GPU: of all of them where autocast
    would cast them or an adapter is merged, else of those that are computed together (query, key, value; gate, up).
    """
    if plan.parted or plan.adapter == "qlora":
        return 0
    shape = plan.policy
    layers = [weight for weight in shape.of_a_layer() if weight.linear]
    if plan.bf16 and hidden_bytes(plan) == FP32:  # a CPU holds these as well, during a call
        return HALF * (_numbers(layers) + shape.vocabulary * shape.hidden)
    if plan.on_cpu:
        return 0
    if plan.adapter == "lora":
        return plan.compute_bytes * _numbers(layers)
    alone = [(shape.hidden, shape.heads * shape.head_dim), (shape.hidden, shape.intermediate)]  # output, down
    return plan.compute_bytes * (_numbers(layers) - shape.layers * sum(a * b for a, b in alone))


def _numbers(weights: Iterable[Weight]) -> int:
    return sum(weight.numbers * weight.count for weight in weights)


def packed_bytes(plan: Plan) -> int:
    """The copies of linear layers, the head among them, that oneDNN multiplies with while a CPU samples in fp32."""
    if not plan.on_cpu or plan.bf16:
        return 0
    shape = plan.policy
    return FP32 * (shape.vocabulary * shape.hidden + shape.layers * sum(a * b for a, b in shape.projections()))


def layer_once(shape: ModelShape, tokens: int, size: int) -> int:
    """What one layer holds at a time where nothing is kept for a backward pass: hidden states twice, what the MLP's two
    halves give and their product; or query, key, value and the attention's result.
    """
    mlp = 2 * shape.hidden + 3 * shape.intermediate
    attention = 2 * shape.hidden + 4 * shape.heads * shape.head_dim
    return size * tokens * max(mlp, attention)


def scoring_terms(plan: Plan) -> Iterator[Term]:
    """Yields what the reward model needs while it reads completions, beside what is held."""
    if plan.reward_model is not None:
        yield Term("scoring", layer_once(plan.reward_model, plan.tokens_scored, plan.reward_model_bytes))


def kv_bytes(plan: Plan) -> int:
    """Keys and values of a sampling call, in the type of products: of each prompt once, and of each completion."""
    tokens = plan.sequences // plan.completions * plan.prompt_tokens + plan.sequences * plan.new_tokens
    return plan.policy.layers * plan.policy.kv_width * 2 * plan.compute_bytes * tokens


def hidden_bytes(plan: Plan) -> int:
    """Bytes of a number in the hidden states between layers: they have the type of the embedding."""
    in_half = plan.bf16 and (plan.adapter == "lora" or plan.by_deepspeed or plan.sharding == "fsdp2")
    return HALF if in_half else FP32


def pass_terms(plan: Plan) -> Iterator[Term]:
    """Yields what the fullest forward and backward pass of a step needs, gradients included."""
    alone = replace(plan, tokens_per_pass=plan.tokens_alone)
    beside = (gradient_term(plan), *of_a_pass(plan))
    own = (*_gradients_at_first(plan), *of_a_pass(alone)) if plan.tokens_alone else ()
    yield from max(beside, own, key=lambda terms: sum(term.gpu for term in terms))


def of_a_pass(plan: Plan) -> Iterator[Term]:
    """Yields what a pass needs beside what is held and gradients."""
    yield Term("buckets", _bucket_bytes(plan))
    yield Term("gathered for a pass", _live_bytes(plan))
    yield Term("activations", activation_bytes(plan))
    yield Term("logits", logit_bytes(plan))


def _gradients_at_first(plan: Plan) -> Iterator[Term]:
    """A step's first pass begins without gradients: they grow as the activations of the layers go. DDP's buckets, and
    the gradients that DeepSpeed holds, are there all the time.
    """
    whole = gradient_term(plan)
    if plan.by_deepspeed:
        yield whole
    elif plan.sharding == "none" and plan.gpus > 1:
        yield Term("gradients", whole.gpu // 2)


def step_terms(plan: Plan) -> Iterator[Term]:
    """Yields what the optimizer's step needs: the gradients, of which DeepSpeed makes a copy in fp32 for its part."""
    yield gradient_term(plan)
    copied = plan.by_deepspeed and plan.bf16 and not plan.offload_optimizer
    stepped = stepped_numbers(trained_weights(plan), plan.sharding, plan.gpus)
    yield Term("gradients in fp32", FP32 * stepped if copied else 0)


def activation_bytes(plan: Plan) -> int:
    """What the layers keep for the backward pass.

    With gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): the input of each layer, and everything of the one
    that is computed again. Without: everything of all layers. An adapter keeps about as much as full training does.
    """
    shape, tokens = plan.policy, plan.tokens_per_pass
    of_layer = tokens * layer_bytes_of_a_token(shape, plan.bf16, hidden_bytes(plan))
    if plan.on_cpu:
        of_layer += tokens * attention_bytes_on_cpu(plan)
    if not plan.gradient_checkpointing:
        return shape.layers * of_layer
    return shape.layers * tokens * shape.hidden * hidden_bytes(plan) + of_layer


def attention_bytes_on_cpu(plan: Plan) -> int:
    """What attention keeps for each token on a CPU beyond `layer_bytes_of_a_token`: keys and values copied for each of
    the query heads, and once more where long rows are read in segments; results in another order; and a mask in fp32
    of what each token may read.
    """
    shape, size = plan.policy, plan.compute_bytes
    attention, readable = shape.heads * shape.head_dim, plan.prompt_tokens + plan.new_tokens
    copies = 2 if readable + plan.new_tokens >= SEGMENTED else 1
    return 2 * size * (copies * attention - shape.kv_width) + size * attention + FP32 * readable


def layer_bytes_of_a_token(shape: ModelShape, bf16: bool, hidden: int = FP32) -> int:
    """What one layer keeps for each token, as counted by Korthikanti et al. (2022, arXiv 2205.05198, section 4.1), here
    for a gated MLP, RMS norms, and attention that keeps no scores.

    Args:
        bf16: whether matrix products are in bf16; autocast then makes an input of its own for each of them.
        hidden: bytes of a number between layers.
    """
    size, attention = HALF if bf16 else FP32, shape.heads * shape.head_dim
    of_each_norm = (FP32 + hidden) * shape.hidden + FP32  # what is normed, in fp32; the normed; one scale
    inputs = (5 if bf16 and hidden == FP32 else 2) * size * shape.hidden  # of query, key, value; of gate and up
    heads = 2 * size * (attention + shape.kv_width) + FP32 * shape.heads  # query, key, value, output; log-sum-exps
    mlp = 4 * size * shape.intermediate  # gate, up, the activation, the product
    normed_heads = (FP32 + size) * (attention + shape.kv_width) + FP32 * (shape.heads + shape.kv_heads)
    return 2 * of_each_norm + inputs + heads + mlp + (normed_heads if shape.qk_norm else 0)


def logit_bytes(plan: Plan) -> int:
    """Logits of a chunk and their gradient, with the head in the type of its products; in the backward pass of a
    trained head also the gradient of its weight, in fp32 and at the end in the weight's own type.
    """
    shape = plan.policy
    most = CHUNK_LOGITS_ON_CPU if plan.on_cpu else CHUNK_LOGITS
    numbers = min(plan.tokens_per_pass, max(1, most // shape.vocabulary)) * shape.vocabulary
    head = shape.vocabulary * shape.hidden
    cast = HALF * head if plan.bf16 and hidden_bytes(plan) == FP32 else 0
    if plan.on_cpu:
        return _logit_bytes_on_cpu(plan, FP32 * numbers, cast)
    chunk = (FP32 + plan.compute_bytes) * numbers + cast
    if plan.adapter != "none":
        return chunk
    return max(chunk + FP32 * head, head * (FP32 + hidden_bytes(plan)) if hidden_bytes(plan) == HALF else 0)


def _logit_bytes_on_cpu(plan: Plan, chunk: int, cast: int) -> int:
    """Where each operation gives an array of its own, and products of half-precision numbers round."""
    head = plan.policy.vocabulary * plan.policy.hidden
    if not plan.bf16:
        cast = FP32 * head + chunk  # oneDNN's own copy of the head, and its result, which is copied
    forward = int(ARRAYS_FORWARD * chunk) + cast
    if plan.adapter != "none":
        return forward
    return max(forward, ARRAYS_BACKWARD * chunk + cast + head * (FP32 + plan.compute_bytes))


def _gathered_bytes(plan: Plan) -> int:
    """The policy's whole weights on one GPU; or the largest part that is needed at a time."""
    whole, shape = plan.policy.parameters, plan.policy
    size = plan.compute_bytes
    return size * (whole if plan.gathers == "whole" else max(2 * shape.layer, shape.vocabulary * shape.hidden))


def _live_bytes(plan: Plan) -> int:
    """Weights that are whole within a pass: under FSDP2 two layers and the tail (norm, head, a tied embedding), with
    the gradients of one layer; under ZeRO-3 as many as `Plan.live`."""
    shape, size = plan.policy, plan.compute_bytes
    if plan.sharding == "fsdp2":
        return size * (3 * shape.layer + shape.vocabulary * shape.hidden)
    return size * min(shape.parameters, plan.live) if plan.sharding == "zero3" else 0


def _bucket_bytes(plan: Plan) -> int:
    """DeepSpeed's buckets of gradients on their way."""
    numbers = plan.policy.hidden**2 if plan.bucket is None else plan.bucket
    return plan.compute_bytes * numbers if plan.by_deepspeed else 0
