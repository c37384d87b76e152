"""Fields of the configuration that say how vLLM samples."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from online_dpo.config.checking import check_numbers, warn_ignored
from online_dpo.config.endpoints import holds_secret
from online_dpo.config.field_specs import documented

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks of adapters that vLLM can be started for."""


def supported_lora_rank(rank: int) -> int:
    """The least rank that vLLM can be started with for adapters of this one; the rank itself if it is too high.

    >>> supported_lora_rank(10)
    16
    """
    return next((known for known in LORA_RANKS if known >= rank), rank)


@documented
@dataclass
class VLLMFields:
    """Part of :class:`online_dpo.OnlineDPOConfig`."""

    # --- vllm ---------------------------------------------------------------------------------------------------------

    use_vllm: bool = False
    """Sample with vLLM, which gets the latest weights before each step. Needs `online-dpo[vllm]`."""

    vllm_mode: Literal["colocate", "server"] = "colocate"
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

    vllm_server_host: str = "0.0.0.0"  # TRL's default; nothing listens there  # nosec B104
    """With `server`: its host; `0.0.0.0` is this machine."""

    vllm_server_port: int = 8000
    """With `server`: its port."""

    vllm_server_timeout: float = 240.0
    """With `server`: seconds that it may fail or be away before the run stops."""

    vllm_weight_transfer: Literal["auto", "broadcast", "file", "http"] = "auto"
    """With `server`: how it gets the weights. `broadcast`: in a process group with the trainer, by NCCL between GPUs
    and by gloo otherwise. `file`: it reads files in the trainer's temporary folder, which both have to see. `http`: as
    bytes. `auto`: `broadcast` where trainer and servers have GPUs of their own, else `file` where a server sees the
    folder, else `http`."""

    vllm_group_port: int = 51216
    """With `broadcast`: port of the trainer's first process, to which the workers of servers connect; 0 is any that is
    free. They connect to the address from which the trainer reaches them."""

    vllm_structured_outputs_regex: str | None = None
    """Not in this version: has to stay unset."""

    @property
    def vllm_server_urls(self) -> list[str]:
        """Addresses of the servers, without blanks and trailing slashes."""
        if self.vllm_server_base_url is None:
            is_default = self.vllm_server_host == VLLMFields.vllm_server_host  # which is no address to connect to
            host = "localhost" if is_default else self.vllm_server_host
            return [f"http://{host}:{self.vllm_server_port}"]
        return [url.strip().rstrip("/") for url in self.vllm_server_base_url.split(",") if url.strip()]


READ_BY = {
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
"""Fields that only one of the modes reads."""


def unread_vllm_fields(args: VLLMFields) -> list[str]:
    """Returns the names of the fields that nothing reads because vLLM is not used."""
    return [] if args.use_vllm else [field.name for field in fields(VLLMFields) if field.name.startswith("vllm_")]


def check_vllm(args: VLLMFields) -> None:
    """Check how vLLM samples. Fields that are not read give a warning.

    Raises:
        ValueError: vLLM is used, and a field has a value that cannot be used.
    """
    if any(map(holds_secret, (args.vllm_server_base_url or "").split(","))):
        raise ValueError(
            "`vllm_server_base_url` holds a user name, a password or a key, which would be shown in logs. Servers of "
            "`online-dpo serve` take none: leave it out."
        )
    names = [field.name for field in fields(VLLMFields) if field.name.startswith("vllm_")]
    changed = [name for name in names if getattr(args, name) != getattr(VLLMFields, name)]
    if not args.use_vllm:
        warn_ignored(changed, "without `use_vllm`")
        return
    if args.vllm_structured_outputs_regex is not None:
        raise ValueError("`vllm_structured_outputs_regex` is not in this version; leave it unset.")
    share = args.vllm_gpu_memory_utilization
    checks = [
        (0 <= args.vllm_group_port < 65536, "vllm_group_port", "a port: 0 to 65535"),
        (args.vllm_server_timeout > 0, "vllm_server_timeout", "above 0"),
        (0 < args.vllm_server_port < 65536, "vllm_server_port", "a port: 1 to 65535"),
        (args.vllm_tensor_parallel_size >= 1, "vllm_tensor_parallel_size", "at least 1"),
        (share is None or 0 < share <= 1, "vllm_gpu_memory_utilization", "above 0 and at most 1"),
        (len(args.vllm_server_urls) > 0, "vllm_server_base_url", "an address, or several separated by commas"),
    ]
    check_numbers(args, checks)
    other = "server" if args.vllm_mode == "colocate" else "colocate"
    ignored = [name for name in changed if name in READ_BY[other]]
    warn_ignored(ignored, f"with `vllm_mode={args.vllm_mode!r}`")
