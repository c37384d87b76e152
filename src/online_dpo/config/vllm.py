"""Fields of the configuration that say how vLLM samples."""

from __future__ import annotations

from dataclasses import dataclass

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
