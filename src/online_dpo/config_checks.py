"""Checks of groups of fields of the configuration."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

if TYPE_CHECKING:
    from online_dpo.config import OnlineDPOConfig

VLLM_MODES = {
    "colocate": (
        "vllm_gpu_memory_utilization",
        "vllm_tensor_parallel_size",
        "vllm_enable_sleep_mode",
        "vllm_model_impl",
    ),
    "server": ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
}
"""The modes, and the fields that only they read."""
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
            warnings.warn(f"Ignored without `use_vllm`: {', '.join(changed)}.", stacklevel=5)
        return
    if args.vllm_mode not in VLLM_MODES:
        raise ValueError(f"`vllm_mode` must be one of {', '.join(VLLM_MODES)}; it is {args.vllm_mode!r}.")
    if args.vllm_structured_outputs_regex is not None:
        raise ValueError("`vllm_structured_outputs_regex` is not in this version; leave it unset.")
    share = args.vllm_gpu_memory_utilization
    checks = [
        (args.vllm_server_timeout > 0, "vllm_server_timeout", "above 0"),
        (0 < args.vllm_server_port < 65536, "vllm_server_port", "a port: 1 to 65535"),
        (args.vllm_tensor_parallel_size >= 1, "vllm_tensor_parallel_size", "at least 1"),
        (share is None or 0 < share <= 1, "vllm_gpu_memory_utilization", "above 0 and at most 1"),
        (len(args.vllm_server_urls) > 0, "vllm_server_base_url", "an address, or several separated by commas"),
    ]
    for holds, name, wanted in checks:
        if not holds:
            raise ValueError(f"`{name}` must be {wanted}; it is {getattr(args, name)!r}.")
    other = "server" if args.vllm_mode == "colocate" else "colocate"
    ignored = [name for name in changed if name in VLLM_MODES[other]]
    if ignored:
        warnings.warn(f"Ignored with `vllm_mode={args.vllm_mode!r}`: {', '.join(ignored)}.", stacklevel=5)


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
