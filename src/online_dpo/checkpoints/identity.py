"""What a run computes with, as its checkpoints hold it, and how two runs differ.

This module loads nothing heavy: the command line compares options before it loads a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from online_dpo.checkpoints.folders import checkpoints_in, located
from online_dpo.checkpoints.manifest import manifest_of
from online_dpo.checkpoints.needed import STATE

BLOCK = "run"
"""The block of a manifest's ``extra`` that holds the identity of its run."""

NOT_COMPARED = frozenset(
    (
        # where files go, what is shown, and to whom
        *("output_dir", "overwrite_output_dir", "logging_strategy", "logging_steps", "logging_first_step"),
        *("logging_nan_inf_filter", "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm", "report_to"),
        *("run_folder", "log_completions", "log_completions_max_mb", "num_completions_to_print"),
        *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "debug"),
        *("include_num_input_tokens_seen", "skip_memory_metrics", "push_to_hub", "hub_token", "hub_private_repo"),
        *("hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "save_only_model", "save_strategy"),
        *("save_steps", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint", "load_best_model_at_end"),
        # evaluations: they change nothing of training
        *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only"),
        *("eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("include_for_metrics", "batch_eval_metrics", "eval_reward_model_path", "overoptimisation"),
        *("overoptimisation_patience", "do_train", "do_eval", "do_predict"),
        # how long a run is, how it is resumed, and when it gives up
        *("max_steps", "num_train_epochs", "resume_from_checkpoint", "resume_anyway", "ignore_data_skip"),
        *("restore_callback_states_from_checkpoint", "max_skipped_steps", "sync_check_steps"),
        *("max_idle_steps", "max_failure_share", "stop_timeout", "reward_timeout", "human_timeout"),
        # memory, speed and machines: the same numbers but for rounding
        *("use_cpu", "local_rank", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_cache"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "torch_empty_cache_steps", "share_prompts", "flex_attention"),
        *(
            "max_tokens_per_pass",
            "rollout_batch_size",
            "reward_batch_size",
            "reward_model_sharding",
            "cuda_graphs",
            "compile_sampling",
            "cache_implementation",
        ),
        *("dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("fsdp", "fsdp_config", "deepspeed", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("ddp_backend", "ddp_timeout", "ds3_gather_for_generation", "vllm_model_impl"),
        *("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode"),
        *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
        *("vllm_weight_transfer", "vllm_group_port"),
        # compared in what comes of them: prompts, weights, the engine (of the batch: `BATCH`, of DeepSpeed: `OF_ZERO`)
        *("invalid_prompts", "reward_model_path", "model_init_kwargs", "trust_remote_code"),
        *("use_vllm", "vllm_mode", "engine"),
    )
)
"""Fields that do not change what is computed, or that are compared otherwise. Every other one is compared."""

IN_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
"""Fields that a resumed run reads from the optimizer's state in the checkpoint."""


BATCH = "per_device_train_batch_size x gradient_accumulation_steps x processes"
"""The prompts of an optimizer step: however they are cut and shared, the gradient is the same."""
OF_ZERO = ("optimizer", "scheduler")
"""Sections of a file for DeepSpeed that decide what is computed. The others are about memory and speed."""


def compared_options(options: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """The options that are compared, of all fields of a configuration, as JSON has them."""
    kept = {name: value for name, value in options.items() if name not in NOT_COMPARED}
    if isinstance(kept.get("accelerator_config"), dict):  # null and false mean the same here, and become false
        kept["accelerator_config"] = {**kept["accelerator_config"], "dispatch_batches": False}
    if isinstance(options.get("deepspeed"), dict):
        kept |= {f"deepspeed.{name}": options["deepspeed"].get(name) for name in OF_ZERO}
    kept |= _batch(options, processes)
    return json.loads(json.dumps(kept, default=str))


def _batch(options: Mapping[str, Any], processes: int) -> dict[str, int]:
    sizes = [options.get("per_device_train_batch_size"), options.get("gradient_accumulation_steps", 1)]
    if not all(isinstance(size, int) for size in sizes):
        return {}
    split = (options.get("accelerator_config") or {}).get("split_batches")  # then a batch is that of all processes
    return {BATCH: math.prod(sizes) * (1 if split else processes)}


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What differs between two runs, one line each; what only one of them knows of is not compared.

    >>> differences({"seed": 0, "peft_config": {"r": 4}}, {"seed": 1, "peft_config": {"r": 8}})
    ['seed: checkpoint has 0, this run has 1', 'peft_config.r: checkpoint has 4, this run has 8']
    """
    return list(_differences(saved, own, ""))


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name in own:
        if name not in saved or saved[name] == own[name]:
            continue
        before, now = _by_place(saved[name]), _by_place(own[name])
        if isinstance(before, dict) and isinstance(now, dict) and (before.keys() & now.keys()):
            yield from _differences(before, now, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}: checkpoint has {_shown(saved[name])}, this run has {_shown(own[name])}"


def _by_place(value: Any) -> Any:
    """A list of mappings, such as scorers, as one mapping."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {f"{place}.{name}": entry for place, item in enumerate(value) for name, entry in item.items()}
    return value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refusal(folder: Path, different: list[str]) -> str:
    """The error message for a checkpoint of a run that computed with something else."""
    return (
        f"{folder} is of a run that computes something else: {'; '.join(different)}. Put this back as it was, or go "
        "on from it all the same with `resume_anyway: true` (`--resume_anyway`, `resume_anyway=True`)."
    )


def gone_on_anyway(folder: Path, different: list[str]) -> str:
    """The warning where such a checkpoint is resumed because `resume_anyway` says so."""
    kept = [name for name in IN_OPTIMIZER if any(line.startswith(f"{name}: ") for line in different)]
    of_optimizer = f" The optimizer's state in it decides {', '.join(kept)}." if kept else ""
    return (
        f"Resuming from {folder} although its run differs (`resume_anyway`): {'; '.join(different)}.{of_optimizer} "
        "Completions that were sampled ahead are dropped."
    )


def identity_of(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of its run; ``None`` if nothing."""
    manifest = manifest_of(located(folder))
    block = None if manifest is None else manifest.extra.get(BLOCK)
    if manifest is None or not isinstance(block, dict):
        return None
    options = block.get("options")
    if isinstance(options, dict) and BATCH not in options:  # of an earlier version
        block = {**block, "options": {**options, **_batch(options, manifest.world_size)}}
    return block


def of_other_runs(run_dir: Path, own: set[str]) -> list[Path]:
    """The checkpoints in a folder that are of other runs than these."""
    return [folder for folder in checkpoints_in(run_dir) if (identity_of(folder) or {}).get("id") not in own]


def is_over(folder: Path) -> bool:
    """Whether a checkpoint is that of the last step of its run."""
    try:
        state = json.loads((located(folder) / STATE).read_bytes())
        return state["global_step"] >= state["max_steps"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def taken(run_dir: Path, others: list[Path], different: list[str] | None) -> str:
    """The error message for a folder that holds checkpoints of another run, or of one that is not over.

    Args:
        different: how that run differs; ``None`` if it does not say what it computed with.
    """
    names = others[-1].name if len(others) == 1 else f"{others[0].name} to {others[-1].name}"
    what = f"another run ({'; '.join(different)})" if different else "a run with these settings that is not over"
    return (
        f"{run_dir} holds {names} of {'another run' if different is None else what}. To go on from there, resume "
        "(`--resume_from_checkpoint`, `trainer.train(resume_from_checkpoint=True)`); to start anew, give another "
        "`output_dir`, or `overwrite_output_dir: true`, which deletes these checkpoints."
    )
