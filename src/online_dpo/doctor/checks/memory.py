"""Free memory of the device and the machine against an estimate for this model, batch, K and lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, gib, ok, problem, warning
from online_dpo.doctor.registry import check
from online_dpo.modeling.malloc import KEPT_BYTES
from online_dpo.sizing.held import FP32, HALF
from online_dpo.sizing.lengths import fullest_pass
from online_dpo.sizing.needs import LIBRARIES, Needs, memory_needs
from online_dpo.sizing.plan import Plan, Sharding
from online_dpo.sizing.shape import KNOWN, ModelShape, as_reward_model, shape_of

GIB = 2**30
CONTEXT = int(1.5 * GIB)
"""What CUDA, NCCL and the allocator take of a GPU beside tensors."""
TIGHT = 0.9
FEWEST = 512
"""Tokens of a pass below which less saves little."""
CGROUP = Path("/sys/fs/cgroup")
SHOWN = 4
CHANGE = (
    "Lower `max_tokens_per_pass`, `per_device_train_batch_size`, `rollout_batch_size` or `max_length`, train an "
    "adapter (`use_peft`), set `gradient_checkpointing: true`, or share the work (`fsdp`, `deepspeed`: see "
    "docs/guides/several-gpus.md)."
)


@check("memory")
def memory(case: Case) -> Iterator[Finding]:
    """What one process takes at the fullest moment of a step, by the formula of docs/guides/several-gpus.md."""
    kind = case.config.model_type
    if kind not in KNOWN:
        size = weights_alone(case)
        found = f"memory is not estimated for models of type {kind!r}; their weights and Adam's state take {gib(size)}"
        yield from _compared(case, found, size, size)
        return
    plan = plan_of(case, case.args.tokens_per_pass)
    if plan.on_cpu:
        yield from _on_cpu(case, plan, memory_needs(plan))
        return
    if case.args.max_tokens_per_pass is None:
        plan = fitting(partial(plan_of, case), case.args.tokens_per_pass, torch.cuda.mem_get_info()[0])
    yield from _on_gpu(case, plan, memory_needs(plan))


def weights_alone(case: Case) -> int:
    """Returns the bytes of weights, gradients, Adam's state and reference, where nothing more is known."""
    return case.counts.parameters * (4 * FP32 + FP32 * (case.args.reference_free is False))


def fitting(plan_with: Callable[[int], Plan], most: int, free: int) -> Plan:
    """Returns the run with as many tokens of a pass as fit on a GPU, as `training.pass_size` will choose them: with
    half as many each time that they do not, down to `FEWEST`.
    """
    tokens = most
    while tokens > FEWEST and memory_needs(plan_with(tokens)).gpu + CONTEXT > TIGHT * free:
        tokens //= 2
    return plan_with(tokens)


def plan_of(case: Case, most_tokens: int) -> Plan:
    """Returns the run in the words of the formula, with passes of at most so many tokens. Answers are taken to be of
    all lengths up to the longest.
    """
    args, subject = case.args, case.subject
    longest = args.max_new_tokens
    prompts = [len(ids) for ids in case.dataset["prompt_ids"][:]]
    sizes = fullest_pass(
        prompts,
        [max(1, longest // 4), max(1, longest // 2), longest],
        per_batch=args.per_device_train_batch_size,
        batches=args.gradient_accumulation_steps,
        most_tokens=most_tokens,
        num_completions=args.num_completions,
        scored_at_once=args.reward_batch_size,
    )
    reward = _reward_model(case)
    sharding, options = _sharding(case)
    sampled = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_completions
    on_cpu = args.device.type == "cpu"
    return Plan(
        shape_of(case.config.to_dict()),
        sharding,
        subject.processes,
        offload_optimizer=_is_offloaded(options, "offload_optimizer"),
        offload_parameters=_is_offloaded(options, "offload_param") or bool(options.get("cpu_offload")),
        on_cpu=on_cpu,
        bf16=bool(args.bf16 or args.fp16),
        adapter="qlora" if subject.quantized else "lora" if subject.lora_rank else "none",
        lora_rank=subject.lora_rank or 16,
        double_quantization=subject.double_quantization,
        packed_as_floats=_packed_as_floats(args.model_init_kwargs),
        reference=not args.reference_free,
        reward_model=None if reward is None else reward[0],
        reward_model_bytes=HALF if reward is None else reward[1],
        reward_model_sharded=args.reward_model_sharding == "shard",
        engine={"vllm_server": "servers", "vllm_colocate": "vllm"}.get(args.engine_name, "built-in"),  # pyright: ignore[reportArgumentType]
        sequences=min(max(args.rollout_batch_size, args.num_completions), sampled),
        completions=args.num_completions,
        prompt_tokens=max(prompts),
        new_tokens=longest,
        vllm_share=args.vllm_gpu_memory_utilization or 0.0,
        gpu_bytes=0 if on_cpu else torch.cuda.get_device_properties(0).total_memory,
        tokens_per_pass=sizes.beside,
        tokens_alone=sizes.alone,
        tokens_scored=sizes.scored,
        gradient_checkpointing=bool(args.gradient_checkpointing),
    )


def _sharding(case: Case) -> tuple[Sharding, dict[str, Any]]:
    asked = case.subject.sharding
    if asked is None:
        return "none", {}
    if asked.kind == "fsdp":
        return "fsdp2", asked.options
    zero = asked.options["zero_optimization"]
    stages: dict[int, Sharding] = {0: "none", 1: "zero1", 2: "zero2", 3: "zero3"}
    return stages[zero["stage"]], zero


def _packed_as_floats(options: Any) -> bool:
    """Whether weights in 4 bits are stored as floats."""
    given = (options or {}).get("quantization_config") or {}
    storage = given.get("bnb_4bit_quant_storage") if isinstance(given, dict) else given.bnb_4bit_quant_storage
    return "float" in str(storage)


def _is_offloaded(options: dict[str, Any], name: str) -> bool:
    given = options.get(name)
    return isinstance(given, dict) and given.get("device", "none") != "none"


def _reward_model(case: Case) -> tuple[ModelShape, int] | None:
    """The shape of the reward model, if there is one of a known kind, and the bytes of a number in it."""
    if case.subject.reward_model is None:
        return None
    given = case.config_of(case.subject.reward_model).to_dict()
    in_half = "16" in str(given.get("dtype"))
    return (as_reward_model(shape_of(given)), HALF if in_half else FP32) if given["model_type"] in KNOWN else None


def _on_cpu(case: Case, plan: Plan, needs: Needs) -> Iterator[Finding]:
    each = needs.process + LIBRARIES
    whole = each * plan.gpus
    found = f"a process takes about {gib(each)}" + ("" if plan.gpus == 1 else f", {plan.gpus} of them {gib(whole)}")
    if needs.process > KEPT_BYTES // 4:
        found += f" (and each up to {gib(KEPT_BYTES)} that glibc keeps once it is freed)"
    yield from _compared(case, found, whole, whole, lines=tuple(largest(needs)), facts=needs.phases())


def _on_gpu(case: Case, plan: Plan, needs: Needs) -> Iterator[Finding]:
    free, _ = torch.cuda.mem_get_info()
    each = needs.gpu + CONTEXT
    found = f"a GPU needs about {gib(each)}, and {gib(free)} are free"
    lines, facts = tuple(largest(needs)), {**needs.phases(), "estimate": each, "free": free}
    if each > free:
        case.too_large = True
        yield problem(found, CHANGE, lines=lines, **facts)
    elif each > TIGHT * free:
        yield warning(found, CHANGE, lines=lines, **facts)
    else:
        yield ok(found, lines=lines, **facts)
    loaded = FP32 * case.counts.parameters  # a model is read into the machine's memory first
    host = (needs.host + loaded + LIBRARIES) * plan.gpus
    yield from _compared(case, f"the machine's memory: about {gib(host)} for {plan.gpus} process(es)", host, loaded)


def _compared(
    case: Case, found: str, needed: int, here: int, lines: tuple[str, ...] = (), facts: dict[str, Any] | None = None
) -> Iterator[Finding]:
    """Compares what all processes on this machine need with its free memory; ``here`` is the need of this one."""
    free = free_memory()
    text = f"{found}; {gib(free)} are free"
    known = {**(facts or {}), "estimate": needed, "free": free}
    case.too_large = case.too_large or here > free
    if needed > free:
        yield problem(text, CHANGE, lines=lines, **known)
    elif needed > TIGHT * free:
        yield warning(text, CHANGE, lines=lines, **known)
    else:
        yield ok(text, lines=lines, **known)


def free_memory() -> int:
    """Returns the bytes that processes on this machine can have, in this container."""
    free, limit, used = psutil.virtual_memory().available, CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        return min(free, int(text) - int(used.read_text()))
    return free


def largest(needs: Needs) -> Iterator[str]:
    """Yields the largest parts of the fullest moment, one a line."""
    phases = needs.phases()
    fullest = max((name for name in phases if name != "held"), key=lambda name: phases[name])
    terms = [*needs.held, *getattr(needs, fullest)]
    for term in sorted(terms, key=lambda one: -one.gpu - one.host)[:SHOWN]:
        yield f"{gib(term.gpu + term.host):>10}  {term.name}"
