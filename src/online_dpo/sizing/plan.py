"""How a model is to be trained, as far as memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from online_dpo.sizing.shape import ModelShape

Sharding = Literal["none", "zero1", "zero2", "zero3", "fsdp2"]
Adapter = Literal["none", "lora", "qlora"]
Engine = Literal["built-in", "vllm", "servers"]

PARTED_WEIGHTS = ("zero3", "fsdp2")
"""Ways of sharding that leave each GPU a part of every weight."""
ENGINES_OF_DEEPSPEED = ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Plan:
    """What decides how much memory one GPU needs.

    >>> Plan(MODELS["7B"], "zero3", gpus=8, offload_optimizer=True)

    Raises:
        ValueError: parts that do not go together.
    """

    policy: ModelShape
    sharding: Sharding = "none"
    gpus: int = 1
    offload_optimizer: bool = False
    """ZeRO: Adam's state and the weights that it steps are in the machine's memory. FSDP2 has only all or nothing."""
    offload_parameters: bool = False
    """ZeRO-3: the parts of weights are too. FSDP2: these, their gradients and Adam's state."""
    on_cpu: bool = False
    """The processes compute on CPUs; ``gpus`` is then their number."""
    bf16: bool = True
    adapter: Adapter = "none"
    lora_rank: int = 16
    """Rank of an adapter on all linear layers of the model's layers."""
    double_quantization: bool = False
    """QLoRA: the scales of blocks are quantised as well (``bnb_4bit_use_double_quant``)."""
    packed_as_floats: bool = False
    """QLoRA: weights in 4 bits are stored as floats (``bnb_4bit_quant_storage``), so that FSDP2 shards them; otherwise,
    and under ZeRO-3, they are counted as whole on every GPU."""
    reference: bool = True
    """Whether there is one. With an adapter it is the policy without it, and costs nothing."""
    reward_model: ModelShape | None = None
    """One that is held on every GPU; see `shape.as_reward_model`."""
    reward_model_bytes: int = 2
    """Bytes of a number in it, as it was saved."""
    reward_model_sharded: bool = False

    engine: Engine = "built-in"
    gathers: Literal["whole", "layers"] = "whole"
    """The built-in engine under ZeRO-3 and FSDP2: all weights of a call together, or one layer after the other."""
    sequences: int = 64
    """Completions that are sampled together on one GPU: prompts of a call times K."""
    completions: int = 2
    """K: so many share the keys and values of a prompt."""
    prompt_tokens: int = 512
    new_tokens: int = 512
    vllm_share: float = 0.55
    """vLLM in process: ``vllm_gpu_memory_utilization``."""
    gpu_bytes: int = 80 * 2**30
    """Memory of a GPU, of which vLLM takes that share."""

    tokens_per_pass: int = 16384
    """Tokens of a pass, padding included, that has gradients of earlier passes of its step beside it."""
    tokens_alone: int = 0
    """Tokens of the largest pass that is the only one of its step, which begins without gradients; 0: there is none."""
    tokens_scored: int = 0
    """Tokens that the reward model reads at a time; 0: fewer than matter."""
    gradient_checkpointing: bool = True
    bucket: int | None = None
    """DeepSpeed's ``reduce_bucket_size``, in numbers; ``None`` is ``auto``, the square of the hidden size. Where a file
    leaves it out, DeepSpeed takes 500 million."""
    live: int = 1_000_000_000
    """DeepSpeed's ``stage3_max_live_parameters``: numbers of gathered weights at a time."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"There is at least one GPU, not {self.gpus}.")
        if self.offload_optimizer and self.sharding not in ENGINES_OF_DEEPSPEED:
            raise ValueError("Adam's state alone leaves the GPU under ZeRO only. FSDP2 has `offload_parameters`.")
        if self.offload_parameters and self.sharding not in PARTED_WEIGHTS:
            raise ValueError("Weights leave the GPU under ZeRO-3 and FSDP2 only.")

    @property
    def parted(self) -> bool:
        """Whether a GPU holds only a part of each weight."""
        return self.sharding in PARTED_WEIGHTS

    @property
    def by_deepspeed(self) -> bool:
        """Whether DeepSpeed's engine holds the weights."""
        return self.sharding in ENGINES_OF_DEEPSPEED

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in matrix products."""
        return 2 if self.bf16 else 4
