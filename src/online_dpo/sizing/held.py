"""Bytes that one GPU holds from the first step to the last: weights, gradients, Adam's state, reference, reward model.

The tests count the tensors of real trainers and find these bytes, to the last one. Counted on the rank that holds most.

Sources. "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (Rajbhandari et al. 2020, arXiv
1910.02054), section 3.1: Adam with mixed precision holds 2 bytes of weights, 2 of gradients and K = 12 of state for
each parameter, and stages 1, 2, 3 divide K, then gradients, then weights by the number of GPUs. Its weights are in
bf16; ours are in fp32 but under DeepSpeed's engine (`modeling.precision` says why), which makes 4, 4 and 8. FSDP2: each
weight is cut along its rows and padded to equal parts (torch, ``fully_shard``). 4 bits: "QLoRA" (Dettmers et al. 2023,
arXiv 2305.14314), section 3: blocks of 64 numbers with a scale in fp32, or in 8 bits with one in fp32 for 256 of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from online_dpo.sizing.plan import Plan, Sharding
from online_dpo.sizing.shape import Weight

FP32, HALF = 4, 2
MOMENTS = 2 * FP32
"""Adam's two moments of each number."""
BLOCK, OUTER_BLOCK = 64, 256
"""Numbers in a block of 4-bit weights, and scales in a block of quantised scales."""
CODE = 16 * FP32
"""The 16 values of nf4, kept with each weight."""
OUTER_CODE = 256 * FP32 + FP32
"""The values that quantised scales can have, and their mean."""


@dataclass(frozen=True)
class Term:
    """A part of the memory: what it is, its bytes on the GPU, and on its machine."""

    name: str
    gpu: int
    host: int = 0


def held_terms(plan: Plan) -> Iterator[Term]:
    """Yields what is held all the time, gradients apart."""
    yield from _policy_terms(plan)
    if plan.reference and plan.adapter == "none":
        size = _reference_bytes(plan)
        yield Term("reference", 0, size) if plan.offload_parameters else Term("reference", size)
    if plan.reward_model is not None:
        sharding = plan.sharding if plan.reward_model_sharded else "none"
        numbers = sum(_part(weight, sharding, plan.gpus) for weight in plan.reward_model.weights())
        yield Term("reward model", plan.reward_model_bytes * numbers)


def gradient_term(plan: Plan) -> Term:
    """What the gradients of the trained weights take at the end of the backward pass.

    One process, DDP and ZeRO-1 hold them whole, in the type of the weights; DDP a second time, in the buckets that it
    sends (``gradient_as_bucket_view`` is off in accelerate). ZeRO-2 and 3, and FSDP2, hold a part.
    """
    trained = list(trained_weights(plan))
    if plan.sharding == "fsdp2":
        parts = FP32 * sum(_part(weight, "fsdp2", plan.gpus) for weight in trained)
        return Term("gradients", 0, parts) if plan.offload_parameters else Term("gradients", parts)
    if plan.by_deepspeed:
        return _gradients_of_deepspeed(plan, trained)
    copies = 1 if plan.gpus == 1 else 2
    return Term("gradients", copies * FP32 * _numbers(trained))


def trained_weights(plan: Plan) -> Iterator[Weight]:
    """Yields the weights that the optimizer steps: all of the policy's, or those of its adapter."""
    if plan.adapter == "none":
        yield from plan.policy.weights()
        return
    for outputs, inputs in plan.policy.projections():
        yield Weight(plan.lora_rank, inputs, plan.policy.layers, linear=True)
        yield Weight(outputs, plan.lora_rank, plan.policy.layers, linear=True)


def frozen_bytes(plan: Plan) -> int:
    """Bytes of the base model under an adapter: as saved (bf16), or in 4 bits; 0 without an adapter."""
    if plan.adapter == "none":
        return 0
    if plan.adapter == "lora":
        return HALF * sum(_part(weight, plan.sharding, plan.gpus) for weight in plan.policy.weights())
    # PEFT casts what is not quantised to fp32 (`prepare_model_for_kbit_training`); DeepSpeed's engine back to bf16.
    rest = HALF if plan.by_deepspeed and plan.bf16 else FP32
    matrices = [weight for weight in plan.policy.of_a_layer() if weight.columns > 1]
    shards = plan.gpus if plan.packed_as_floats and plan.sharding == "fsdp2" else 1
    packed = sum(weight.count * four_bit_bytes(weight.numbers, plan.double_quantization, shards) for weight in matrices)
    others = [weight for weight in plan.policy.weights() if weight not in matrices]
    return packed + rest * sum(_part(weight, plan.sharding, plan.gpus) for weight in others)


def four_bit_bytes(numbers: int, double: bool, shards: int = 1) -> int:
    """Bytes of one weight in 4 bits, with its scales and the values that its codes stand for. Its codes alone are
    divided into ``shards``.
    """
    blocks = -(-numbers // BLOCK)
    scales = blocks + FP32 * -(-blocks // OUTER_BLOCK) + OUTER_CODE if double else FP32 * blocks
    return -(-numbers // (2 * shards)) + scales + CODE


def _policy_terms(plan: Plan) -> Iterator[Term]:
    trained = list(trained_weights(plan))
    sharding, gpus = plan.sharding, plan.gpus
    size = HALF if plan.by_deepspeed and plan.bf16 else FP32
    weights = frozen_bytes(plan) + size * sum(_part(weight, sharding, gpus) for weight in trained)
    parts_on_host = plan.offload_parameters
    yield Term("weights", 0, weights) if parts_on_host else Term("weights", weights)
    stepped = stepped_numbers(trained, sharding, gpus)
    # DeepSpeed steps a copy in fp32 of its part, whatever the type of the weights.
    state = (MOMENTS + (FP32 if plan.by_deepspeed else 0)) * stepped
    on_host = plan.offload_optimizer or (sharding == "fsdp2" and plan.offload_parameters)
    yield Term("optimizer", 0, state) if on_host else Term("optimizer", state)


def stepped_numbers(trained: Iterable[Weight], sharding: Sharding, gpus: int) -> int:
    """How many numbers the optimizer of one rank steps.

    ZeRO-1 and 2 lay each group of the optimizer (those that decay: matrices; the rest: biases and norms) in one row,
    pad it, and give every rank an equal part.
    """
    trained = list(trained)
    if sharding not in ("zero1", "zero2"):
        return sum(_part(weight, sharding, gpus) for weight in trained)
    groups = [
        _numbers(weight for weight in trained if (weight.columns > 1) == is_matrix) for is_matrix in (True, False)
    ]
    return sum(2 * -(-numbers // (2 * gpus)) for numbers in groups)


def _gradients_of_deepspeed(plan: Plan, trained: list[Weight]) -> Term:
    size = HALF if plan.bf16 else FP32
    stepped = stepped_numbers(trained, plan.sharding, plan.gpus)
    if plan.offload_optimizer:
        return Term("gradients", size * _numbers(trained) if plan.sharding == "zero1" else 0, FP32 * stepped)
    whole = plan.sharding == "zero1"
    return Term("gradients", size * (_numbers(trained) if whole else stepped))


def _reference_bytes(plan: Plan) -> int:
    """The frozen copy: linear layers in the type of their products, the rest in fp32 (`modeling.precision`); under
    DeepSpeed all in the type of its engine, as the policy is.
    """
    rest = plan.compute_bytes if plan.by_deepspeed else FP32
    return sum(
        (plan.compute_bytes if weight.linear else rest) * _part(weight, plan.sharding, plan.gpus)
        for weight in plan.policy.weights()
    )


def _part(weight: Weight, sharding: Sharding, gpus: int) -> int:
    """Numbers of a weight, of all its equal ones, on the rank that holds most."""
    if sharding == "zero3":
        return weight.count * -(-weight.numbers // gpus)
    if sharding == "fsdp2":
        return weight.count * -(-weight.rows // gpus) * weight.columns
    return weight.count * weight.numbers


def _numbers(weights: Iterable[Weight]) -> int:
    return sum(weight.numbers * weight.count for weight in weights)
