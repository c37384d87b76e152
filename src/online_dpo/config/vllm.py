"""Fields of the configuration that say how vLLM samples."""

from __future__ import annotations

import warnings
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from online_dpo.config.trainer_config import OnlineDPOConfig

from dataclasses import dataclass

from online_dpo.config.checking import check_numbers
from online_dpo.config.field_specs import documented


@documented
@dataclass
class VLLMFields:
    """Part of :class:`online_dpo.OnlineDPOConfig`."""

    # --- vllm ---------------------------------------------------------------------------------------------------------

    use_vllm: bool = False
    """Sample with vLLM, which gets the latest weights before each step. Needs `online-dpo[vllm]`."""

    vllm_mode: str = "colocate"
    """`colocate`: in this process, on its device. `server`: servers started with `online-dpo serve`."""

    vllm_model_impl: str = "vllm"
    """`vllm`, or `transformers` for models that vLLM has no code of its own for."""

    vllm_gpu_memory_utilization: float | None = 0.55
    """With `colocate`: share of the GPU's memory that vLLM takes."""

    vllm_tensor_parallel_size: int = 1
    """With `colocate` and a single training process: GPUs that vLLM spreads the model over."""

    vllm_enable_sleep_mode: bool = False
    """With `colocate`: vLLM leaves the GPU's memory while the model is trained."""

    vllm_server_base_url: str | None = None
    """With `server`: the address, or several separated by commas, which share the prompts. When not set, it is made of
    `vllm_server_host` and `vllm_server_port`."""

    vllm_server_host: str = "0.0.0.0"
    """With `server`: its host; `0.0.0.0` is this machine."""

    vllm_server_port: int = 8000
    """With `server`: its port."""

    vllm_server_timeout: float = 240.0
    """With `server`: seconds that it may fail or be away before the run stops."""

    vllm_weight_transfer: str = "auto"
    """With `server`: how it gets the weights. `broadcast`: in a process group with the trainer, by NCCL between GPUs
    and by gloo otherwise. `file`: it reads files in the trainer's temporary folder, which both have to see. `http`: as
    bytes. `auto`: `broadcast` where trainer and servers have GPUs of their own, else `file` where a server sees the
    folder, else `http`."""

    vllm_group_port: int = 51216
    """With `broadcast`: port of the trainer's first process, to which the workers of servers connect; 0 is any that is
    free. They connect to the address from which the trainer reaches them."""

    vllm_structured_outputs_regex: str | None = None
    """Not in this version: has to stay unset."""


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
