"""Checks of groups of fields of the configuration."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from online_dpo.distributed.processes import SLURM, start_alone, started_together

if TYPE_CHECKING:
    from online_dpo.config.trainer_config import OnlineDPOConfig

EPOCH_FIELDS = ("beta", "xpo_alpha", "mixture_coef")
"""Fields that may hold a number for each epoch."""
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
LOSSES_WITHOUT_LABELS = ("sft",)
LOSSES_WITHOUT_REFERENCE = ("simpo", "sft")
VLLM_MODES = {
    "colocate": (
        "vllm_gpu_memory_utilization",
        "vllm_tensor_parallel_size",
        "vllm_enable_sleep_mode",
        "vllm_model_impl",
    ),
    "server": (
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_weight_transfer",
        "vllm_group_port",
    ),
}
"""The modes, and the fields that only they read."""
VLLM_WEIGHT_TRANSFERS = ("auto", "broadcast", "file", "http")
REFUSED_GENERATION_KWARGS = {
    "num_beams": "beam search does not sample from the policy",
    "num_beam_groups": "beam search does not sample from the policy",
    "do_sample": "completions of one prompt must differ, so they are always sampled",
    "num_return_sequences": "set num_completions",
    "max_new_tokens": "set max_new_tokens in the configuration itself",
    "max_length": "set max_new_tokens in the configuration itself",
    "use_cache": "the KV cache is always on",
    "return_dict_in_generate": "the trainer reads the outputs itself",
    "output_scores": "the trainer reads the outputs itself",
    "output_logits": "the trainer reads the outputs itself",
    "pad_token_id": "padding is masked, so no token of its own is needed",
    "typical_p": "the sampler knows temperature, top_k, top_p, min_p and repetition_penalty",
    "epsilon_cutoff": "the sampler knows temperature, top_k, top_p, min_p and repetition_penalty",
    "eta_cutoff": "the sampler knows temperature, top_k, top_p, min_p and repetition_penalty",
    "top_h": "the sampler knows temperature, top_k, top_p, min_p and repetition_penalty",
    "assistant_model": "assisted generation changes which random numbers are drawn",
    "logits_processor": "pass options of GenerationConfig here, not objects",
    "stopping_criteria": "pass options of GenerationConfig here, such as stop_strings",
}


def check_ranges(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: a number is out of range.
    """
    sampling = {name: getattr(args, name) for name in SAMPLING_FIELDS}
    given: dict[str, Any] = {**(args.generation_kwargs or {})}  # pyright: ignore[reportGeneralTypeIssues]
    sampling |= {name: value for name, value in given.items() if name in SAMPLING_FIELDS}
    betas, alphas, shares = (epoch_values(getattr(args, name)) for name in EPOCH_FIELDS)
    checks = [
        (args.max_steps > 0 or args.num_train_epochs > 0, "num_train_epochs", "above 0"),
        (args.num_completions >= 2, "num_completions", "at least 2: a pair needs two completions"),
        (args.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
        (args.max_prompt_length is None or args.max_prompt_length >= 1, "max_prompt_length", "at least 1"),
        (sampling["temperature"] > 0, "temperature", "above 0: completions of one prompt have to differ"),
        (0 < sampling["top_p"] <= 1, "top_p", "in (0, 1]"),
        (sampling["top_k"] >= 0, "top_k", "0 (off) or more"),
        (sampling["min_p"] is None or 0 <= sampling["min_p"] <= 1, "min_p", "in [0, 1]"),
        (sampling["repetition_penalty"] > 0, "repetition_penalty", "above 0"),
        (args.rollout_batch_size >= 1, "rollout_batch_size", "at least 1"),
        (args.reward_batch_size >= 1, "reward_batch_size", "at least 1"),
        (args.max_staleness >= 0, "max_staleness", "0 or more"),
        (args.resample_rounds >= 0, "resample_rounds", "0 or more"),
        (args.sync_check_steps >= 0, "sync_check_steps", "0 or more"),
        (args.max_tokens_per_pass is None or args.max_tokens_per_pass >= 1, "max_tokens_per_pass", "at least 1"),
        (args.max_skipped_steps >= 1, "max_skipped_steps", "at least 1"),
        (args.overoptimisation_patience >= 1, "overoptimisation_patience", "at least 1"),
        (_all(beta > 0 for beta in betas), "beta", "above 0, or a list of such numbers"),
        (_all(0 <= alpha < math.inf for alpha in alphas), "xpo_alpha", "0 or more, or a list of such numbers"),
        (_all(0 <= share <= 1 for share in shares), "mixture_coef", "in [0, 1], or a list of such numbers"),
        (args.target_kl is None or 0 < args.target_kl < math.inf, "target_kl", "above 0"),
        (1 < args.beta_range < math.inf, "beta_range", "above 1"),
        (0 < args.beta_gain < 5, "beta_gain", "above 0 and below 5, so that beta stays above 0"),
    ]
    check_numbers(args, checks, sampling)
    if args.prompt_limit is not None and args.prompt_limit < 1:
        raise ValueError(
            f"`max_length` ({args.max_length}) leaves no room for a prompt beside `max_new_tokens` "
            f"({args.max_new_tokens}). Raise `max_length` or lower `max_new_tokens`."
        )


def check_choices(args: OnlineDPOConfig, choices: Sequence[tuple[str, Sequence[str]]]) -> None:
    """
    Raises:
        ValueError: a field, or an item of one that may be a list, is none of those that it may be.
    """
    for name, allowed in choices:
        value = getattr(args, name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item not in allowed:
                close = difflib.get_close_matches(str(item), allowed, n=1)
                hint = f" Did you mean `{close[0]}`?" if close else ""
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; it is {item!r}.{hint}")


def check_losses(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: an option of a loss is out of range, or asks for what the losses cannot do.
    """
    names, weights = args.loss_types, args.loss_weights
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`loss_type` must name at least one loss, and each once; it is {args.loss_type!r}.")
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"`loss_weights` has {len(weights)} numbers, but `loss_type` names {len(names)} losses. Give one for each."
        )
    positive = weights is None or all(0 < weight < math.inf for weight in weights)
    checks = [
        (positive, "loss_weights", "finite numbers above 0"),
        (0 <= args.label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)"),
        (0 <= args.simpo_gamma < math.inf, "simpo_gamma", "0 or more"),
        (0 <= args.dpop_lambda < math.inf, "dpop_lambda", "0 or more"),
    ]
    check_numbers(args, checks)
    if "exo_pair" in names and args.label_smoothing == 0:
        raise ValueError("`exo_pair` is infinite for certain labels: set `label_smoothing`, for example to 1e-3.")
    if set(names) <= set(LOSSES_WITHOUT_LABELS):
        for name in ("label_smoothing", "label_temperature"):
            if getattr(args, name):
                raise ValueError(f"`{name}` has no meaning for `loss_type={args.loss_type!r}`, which reads no labels.")


def check_pairs(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: an option of pair selection is out of range, or two contradict each other.
    """
    low, high, longest = args.min_margin, args.max_margin, args.max_length_ratio
    temperature, top = args.label_temperature, args.judge_top
    unfinished, token = args.missing_eos_penalty, args.length_penalty
    checks = [
        (unfinished is None or 0 < unfinished < math.inf, "missing_eos_penalty", "above 0"),
        (token is None or 0 < token < math.inf, "length_penalty", "above 0"),
        (top is None or 2 <= top <= args.num_completions, "judge_top", f"from 2 to {args.num_completions} completions"),
        (low is None or 0 < low < math.inf, "min_margin", "above 0"),
        (high is None or 0 < high < math.inf, "max_margin", "above 0"),
        (longest is None or longest >= 1, "max_length_ratio", "1 or more"),
        (temperature is None or 0 < temperature < math.inf, "label_temperature", "above 0"),
    ]
    check_numbers(args, checks)
    if low is not None and high is not None and low > high:
        raise ValueError(f"`min_margin` ({low}) is above `max_margin` ({high}): no pair would be left.")
    if args.tie_policy == "first":
        for name in ("min_margin", "margin_weighting", "label_temperature"):
            if getattr(args, name):
                raise ValueError(f"`tie_policy='first'` trains pairs without a margin, which `{name}` needs.")


def check_resampling(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: prompts are to be answered again once scores are there, while the policy that answers is trained.
    """
    beside = args.use_vllm and args.vllm_mode == "server"
    if args.resample_rounds and args.max_staleness and not beside:
        raise ValueError(
            "`resample_rounds` with `max_staleness` samples while the policy is trained, which needs "
            '`vllm_mode="server"`. Set one of the two to 0, or sample with a vLLM server.'
        )


def check_reference(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: how the reference follows the policy is out of range, or there is to be none and something needs it.
            Options of `sync_ref_model` give a warning without it.
    """
    needing = [name for name in args.loss_types if name not in LOSSES_WITHOUT_REFERENCE]
    if args.reference_free and (needing or args.sync_ref_model):
        needs = "`sync_ref_model`" if args.sync_ref_model else f"The loss `{needing[0]}`"
        raise ValueError(f"{needs} needs a reference; leave `reference_free` off.")
    checks = [
        (0 < args.ref_model_mixup_alpha <= 1, "ref_model_mixup_alpha", "in (0, 1]"),
        (args.ref_model_sync_steps >= 1, "ref_model_sync_steps", "at least 1"),
    ]
    check_numbers(args, checks)
    ignored = [f.name for f in fields(args) if f.name.startswith("ref_model_") and getattr(args, f.name) != f.default]
    if ignored and not args.sync_ref_model:
        warnings.warn(f"Ignored without `sync_ref_model`: {', '.join(ignored)}.", stacklevel=4)


def check_unsupported(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: an argument of transformers asks for something that this version does not do.
    """
    if args.fsdp:
        raise ValueError("`fsdp` is not in this version. Use several processes without it (torchrun).")
    if args.remove_unused_columns:
        raise ValueError(
            "`remove_unused_columns` must be False: the prompt itself and the columns that reward functions "
            "receive are no arguments of the model's forward."
        )
    if args.flex_attention and args.device.type == "cpu":
        raise ValueError("`flex_attention=True` needs a GPU: FlexAttention has no backward pass on a CPU.")
    if args.auto_find_batch_size:
        raise ValueError(
            "`auto_find_batch_size` must be False: a micro-batch that runs out of memory is split by the trainer "
            "itself, without changing the gradient."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            "`label_smoothing_factor` smooths next tokens, which the loss does not predict; leave it 0. Preferences "
            "are smoothed by `label_smoothing`."
        )


def check_processes(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: several processes were started, and do not work together: each would train alone, into one folder.
    """
    started = started_together()
    if started is None or args.world_size == started.count:
        return
    if args.device.type == "cpu" and not args.use_cpu and started.variable != SLURM:
        remedy = "On a CPU they work together with `use_cpu: true` (`--use_cpu`, `use_cpu=True`)."
    else:
        remedy = f"To train together, start them with `torchrun --nproc_per_node {started.count}`."
    raise ValueError(
        f"{started.count} processes were started ({started.variable}), but this one trains as one of "
        f"{args.world_size}, into the same folder as the others. {remedy} If each is a run of its own: "
        f"{start_alone(started)[0].lower()}{start_alone(started)[1:]}"
    )


def check_vllm(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: a field of vLLM has a value that cannot be used. One that is not read gives a warning.
    """
    changed = [
        f.name
        for f in fields(args)
        if f.name.startswith("vllm_") and f.default is not MISSING and getattr(args, f.name) != f.default
    ]
    if not args.use_vllm:
        if changed:
            warnings.warn(f"Ignored without `use_vllm`: {', '.join(changed)}.", stacklevel=4)
        return
    if args.vllm_mode not in VLLM_MODES:
        raise ValueError(f"`vllm_mode` must be one of {', '.join(VLLM_MODES)}; it is {args.vllm_mode!r}.")
    if args.vllm_structured_outputs_regex is not None:
        raise ValueError("`vllm_structured_outputs_regex` is not in this version; leave it unset.")
    share = args.vllm_gpu_memory_utilization
    transfers = ", ".join(VLLM_WEIGHT_TRANSFERS)
    checks = [
        (args.vllm_weight_transfer in VLLM_WEIGHT_TRANSFERS, "vllm_weight_transfer", f"one of {transfers}"),
        (0 <= args.vllm_group_port < 65536, "vllm_group_port", "a port: 0 to 65535"),
        (args.vllm_server_timeout > 0, "vllm_server_timeout", "above 0"),
        (0 < args.vllm_server_port < 65536, "vllm_server_port", "a port: 1 to 65535"),
        (args.vllm_tensor_parallel_size >= 1, "vllm_tensor_parallel_size", "at least 1"),
        (share is None or 0 < share <= 1, "vllm_gpu_memory_utilization", "above 0 and at most 1"),
        (len(args.vllm_server_urls) > 0, "vllm_server_base_url", "an address, or several separated by commas"),
    ]
    check_numbers(args, checks)
    other = "server" if args.vllm_mode == "colocate" else "colocate"
    ignored = [name for name in changed if name in VLLM_MODES[other]]
    if ignored:
        warnings.warn(f"Ignored with `vllm_mode={args.vllm_mode!r}`: {', '.join(ignored)}.", stacklevel=4)


def check_generation_kwargs(given: Mapping[str, Any] | str | None) -> None:
    """
    Raises:
        ValueError: an option is none of `transformers.GenerationConfig`, or one that the trainer sets itself.
    """
    known = vars(GenerationConfig())
    for name in given or {}:
        if name in REFUSED_GENERATION_KWARGS:
            raise ValueError(f"`generation_kwargs` must not hold `{name}`: {REFUSED_GENERATION_KWARGS[name]}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"`generation_kwargs` holds `{name}`, which GenerationConfig does not know.{hint}")


def epoch_values(value: float | Sequence[float]) -> list[float]:
    """A field that holds a number, or one for each epoch, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]  # pyright: ignore[reportReturnType]


def _all(holds: Iterable[bool]) -> bool:
    """Whether there is one at least, and all hold."""
    found = list(holds)
    return bool(found) and all(found)


def check_numbers(
    args: OnlineDPOConfig, checks: Sequence[tuple[bool, str, str]], values: Mapping[str, Any] | None = None
) -> None:
    """Each check: whether it holds, the field, and what the field must be. ``values`` has those that differ from it."""
    for holds, name, wanted in checks:
        if not holds:
            value = (values or {}).get(name, getattr(args, name))
            raise ValueError(f"`{name}` must be {wanted}; it is {value!r}.")
