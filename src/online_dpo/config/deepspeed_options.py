"""Options of DeepSpeed: those that a run may have, and those that are refused, each with what to write instead."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
STAGES = (1, 2, 3)
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
TAKEN = (*BATCH, "gradient_clipping", "bf16", "fp16", "zero_optimization", "zero_allow_untested_optimizer")
TAKEN += ("zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state")
TAKEN += ("comms_logger", "flops_profiler", "checkpoint", "communication_data_type", "log_level")
ZERO_TAKEN = ("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions")
ZERO_TAKEN += ("allgather_bucket_size", "use_multi_rank_bucket_allreduce", "overlap_comm", "load_from_fp32_weights")
ZERO_TAKEN += ("offload_param", "offload_optimizer", "sub_group_size", "ignore_unused_parameters")
ZERO_TAKEN += ("round_robin_gradients", "memory_efficient_linear", "log_trace_cache_warnings", "elastic_checkpoint")
ZERO_TAKEN += ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters")
ZERO_TAKEN += ("stage3_model_persistence_threshold", "stage3_max_reuse_distance")
ZERO_TAKEN += ("stage3_gather_16bit_weights_on_model_save",)
OFFLOAD_TAKEN = ("device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "fast_init", "ratio")
OFFLOAD_TAKEN += ("pipeline_read", "pipeline_write", "nvme_path")

NOT_SUPPORTED = "is not supported: runs under it were not compared with those of one process. Leave it out"
_MONITOR = "is not read here: trackers are named in `report_to`. Leave it out"
REFUSED = {
    "optimizer": "would replace `optim`. Leave it out; `optim`, `learning_rate`, `weight_decay` and `adam_*` say it",
    "scheduler": "would replace `lr_scheduler_type`. Leave it out; that and `warmup_steps` say it",
    "activation_checkpointing": "has no effect on models of transformers. Leave it out; set `gradient_checkpointing`",
    "managed_gradient_accumulation": "has to stay true: the trainer says which pass is a step's last. Leave it out",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _MONITOR),
    **dict.fromkeys(("pipeline", "tensor_parallel", "sequence_parallel_size", "expert_parallel"), NOT_SUPPORTED),
    **dict.fromkeys(("amp", "torch_autocast", "compile", "data_types", "hybrid_engine", "elasticity"), NOT_SUPPORTED),
    **dict.fromkeys(("autotuning", "compression_training", "curriculum_learning", "data_efficiency"), NOT_SUPPORTED),
    **dict.fromkeys(("sparse_gradients", "sparse_attention", "quantize_training", "eigenvalue"), NOT_SUPPORTED),
    **dict.fromkeys(("progressive_layer_drop", "prescale_gradients", "disable_allgather"), NOT_SUPPORTED),
}
ZERO_REFUSED = {
    **dict.fromkeys(("zero_quantized_weights", "zero_quantized_nontrainable_weights"), NOT_SUPPORTED),
    **dict.fromkeys(("zero_quantized_gradients", "zero_hpz_partition_size", "zenflow", "legacy_stage1"), NOT_SUPPORTED),
    **dict.fromkeys(("mics_shard_size", "mics_hierarchical_params_gather", "parameter_alignment"), NOT_SUPPORTED),
    **dict.fromkeys(("save_muon_momentum_buffer_in_memory", "stage3_module_granularity_threshold"), NOT_SUPPORTED),
    **dict.fromkeys(("cpu_offload", "cpu_offload_params"), "is an old form. Write `offload_optimizer: {device: cpu}`"),
    "cpu_offload_param": "is an old form. Write `offload_param: {device: cpu}`",
    "stage3_gather_fp16_weights_on_model_save": "is an old name. Write `stage3_gather_16bit_weights_on_model_save`",
}
ALWAYS_ON = {"managed_gradient_accumulation": "the top level", "compute_grad_norm": "zero_optimization"}
"""Options that break a promise of a run when they are off."""


@dataclass(frozen=True)
class RunValues:
    """What a run says of the same things as a configuration of DeepSpeed. ``bf16`` is ``None`` if it depends on the
    device.

    >>> RunValues(8, 2, 4, 1.0, bf16=None, fp16=False, use_cpu=False)
    """

    batch: int
    accumulation: int
    processes: int
    max_grad_norm: float
    bf16: bool | None
    fp16: bool
    use_cpu: bool


def settled(options: Mapping[str, Any], source: str, run: RunValues) -> dict[str, Any]:
    """Returns a checked configuration, in which what a run says anyway is filled in.

    Args:
        source: names the configuration in messages.

    Raises:
        ValueError: an option is unknown, contradicts the run, or is refused.
    """
    result: dict[str, Any] = copy.deepcopy(dict(options))
    result.pop("comment", None)
    _check_names(result, TAKEN, REFUSED, source)
    zero = _mapping(result, "zero_optimization", source)
    _check_names(zero, ZERO_TAKEN, ZERO_REFUSED, f"{source}: `zero_optimization`")
    _check_stage(zero, source)
    _check_offload(zero, source)
    _settle_types(result, source, run)
    _settle_numbers(result, source, run)
    if run.use_cpu:  # its own Adam for offloading would be compiled first, for minutes
        result.setdefault("zero_force_ds_cpu_optimizer", False)
    return result


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value or value.get("enabled", True) is False or all(map(_is_off, value.values()))
    return value in (None, False, 0, 1, "none", "") and value is not True


def _check_names(options: dict[str, Any], taken: Collection[str], refused: Mapping[str, str], source: str) -> None:
    """Removes options that are refused and off; they change nothing."""
    for name, value in list(options.items()):
        if name in ALWAYS_ON and value is False:
            raise ValueError(f"{source}: `{name}: false` is not supported: steps could not be checked. Leave it out.")
        if name in refused or name in ALWAYS_ON:
            if name not in ALWAYS_ON and not _is_off(value):
                raise ValueError(f"{source}: `{name}` {refused[name]}.")
            del options[name]
        elif name not in taken:
            near = difflib.get_close_matches(name, taken, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else " Leave it out."
            raise ValueError(f"{source}: `{name}` is no option that this version takes.{hint}")


def _mapping(options: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    value = options.setdefault(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{source}: `{name}` is {value!r}; wanted: a mapping.")
    return value


def _check_stage(zero: Mapping[str, Any], source: str) -> None:
    stage = zero.get("stage", 0)
    if stage == 0 and not isinstance(stage, bool):
        raise ValueError(
            f"{source} has ZeRO stage 0, which shards nothing. Leave `deepspeed` out: several processes work together "
            "without it. Or give `zero_optimization: {stage: 2}` (1, 2 or 3)."
        )
    if stage not in STAGES or isinstance(stage, bool):
        raise ValueError(f"{source}: `zero_optimization`: `stage` is {stage!r}; wanted: 1, 2 or 3.")


def _check_offload(zero: dict[str, Any], source: str) -> None:
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name) is None:
            continue
        part = _mapping(zero, name, source)
        where = f"{source}: `{name}`"
        _check_names(part, OFFLOAD_TAKEN, {"super_offload": NOT_SUPPORTED}, where)
        device = part.get("device", "none")
        if device == "nvme":
            raise ValueError(f"{where}: `device: nvme` is not supported. Write `cpu`.")
        if device not in ("cpu", "none", AUTO):
            raise ValueError(f"{where}: `device` is {device!r}; wanted: cpu or none.")
        if part.get("ratio", 1) != 1:
            raise ValueError(f"{where}: `ratio` {NOT_SUPPORTED}.")
        if name == "offload_param" and device == "cpu" and zero["stage"] != 3:
            raise ValueError(f"{where} moves weights that only stage 3 partitions; the stage is {zero['stage']}.")


def _settle_types(result: dict[str, Any], source: str, run: RunValues) -> None:
    fp16 = _mapping(result, "fp16", source)
    if fp16.get("enabled", AUTO) is True or run.fp16:
        raise ValueError(f"{source}: fp16 is not supported with DeepSpeed. Use `bf16`.")
    result["fp16"] = {"enabled": False}
    bf16 = _mapping(result, "bf16", source)
    enabled = bf16.setdefault("enabled", AUTO)
    if enabled not in (True, False, AUTO):
        raise ValueError(f"{source}: `bf16`: `enabled` is {enabled!r}; wanted: true, false or auto.")
    if extra := [name for name, value in bf16.items() if name != "enabled" and not _is_off(value)]:
        raise ValueError(f"{source}: `bf16`: `{extra[0]}` {NOT_SUPPORTED}.")
    if enabled != AUTO and run.bf16 is not None and enabled != run.bf16:
        raise ValueError(
            f"{source} says `bf16: {{enabled: {str(enabled).lower()}}}`, and the run `bf16: {str(run.bf16).lower()}`. "
            'Write `enabled: "auto"`, which means what the run says.'
        )


def _settle_numbers(result: dict[str, Any], source: str, run: RunValues) -> None:
    """Fills in what is missing, and compares what is there."""
    wanted = {
        "train_micro_batch_size_per_gpu": (run.batch, "`per_device_train_batch_size`"),
        "gradient_accumulation_steps": (run.accumulation, "`gradient_accumulation_steps`"),
        "train_batch_size": (run.batch * run.accumulation * run.processes, "batch sizes, of all processes together,"),
        "gradient_clipping": (run.max_grad_norm, "`max_grad_norm`"),
    }
    for name, (value, what) in wanted.items():
        given = result.setdefault(name, AUTO)
        if given != AUTO and (isinstance(given, bool) or given != value):
            raise ValueError(
                f"{source} says `{name}: {given}`, and the run's {what} {'is' if what.startswith('`') else 'are'} "
                f'{value:g}. Write "auto", which means what the run says, or leave it out.'
            )
