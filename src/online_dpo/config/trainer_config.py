"""The trainer's configuration: `transformers.TrainingArguments` plus the fields of Online DPO.

Each field is documented once, in the string beneath it; ``online-dpo train --help`` shows the same text. Fields that
TRL's ``OnlineDPOConfig`` has keep its names.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from online_dpo.config import feedback, loss, method
from online_dpo.config.checking import check_choices, check_processes, check_ranges
from online_dpo.config.feedback import FeedbackFields, check_pairs, check_resampling
from online_dpo.config.field_specs import documented
from online_dpo.config.hf_fields import check_names, check_training
from online_dpo.config.hf_ranges import out_of_range
from online_dpo.config.input import settle_input
from online_dpo.config.keyword_arguments import NamedArguments
from online_dpo.config.loss import LossFields, check_losses, check_reference
from online_dpo.config.method import MethodFields, check_method, check_target_kl
from online_dpo.config.names_elsewhere import ARGUMENTS, IN_PYTHON, hint_for
from online_dpo.config.unsupported import check_accelerator, check_generation_kwargs, check_refused, check_unsupported
from online_dpo.config.vllm import VLLMFields, check_vllm
from online_dpo.versions import copy_checkpointing_fields

INVALID_PROMPT_POLICIES = ("error", "filter")
CHOICES = (("invalid_prompts", INVALID_PROMPT_POLICIES),)


@documented
@dataclass
class OnlineDPOConfig(NamedArguments, VLLMFields, LossFields, MethodFields, FeedbackFields, TrainingArguments):
    """Arguments of :class:`online_dpo.OnlineDPOTrainer`.

    Every field of :class:`transformers.TrainingArguments` is here too. Defaults that differ from it: ``learning_rate``
    5e-7, ``logging_steps`` 10, ``gradient_checkpointing`` on, ``bf16`` on where the device computes in bf16,
    ``remove_unused_columns`` off.

    Raises:
        ValueError: a field is out of range, or asks for something that this version does not do.
    """

    # --- training -----------------------------------------------------------------------------------------------------

    learning_rate: float = 5e-7
    """The initial learning rate of the optimizer."""

    logging_steps: float = 10
    """Log every this many optimizer steps; below 1, a share of the whole run."""

    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them. The KV cache of generation is not touched by
    it. `activation_checkpointing`, as transformers calls it from 5.23 on, says the same and comes first where given.
    """

    bf16: bool | None = None
    """Compute in bfloat16 (mixed precision). When not set: on if the device supports it and `fp16` is off, never on a
    CPU.
    """

    share_prompts: bool = True
    """Compute each prompt once for all its completions, in the policy, the reference and the reward models, where a
    check at the start shows that it changes nothing. Off: one completion a row.
    """

    flex_attention: bool = False
    """Read rows that share prompts through FlexAttention, with as many prompts in a row as `max_tokens_per_pass`
    allows. Needs a GPU and models loaded with SDPA. Tested by value on CPU; its speed has not been measured yet.
    """

    max_tokens_per_pass: int | None = None
    """Most tokens in one forward and backward pass, each prompt counted once and padding not at all. A micro-batch with
    more is computed in several passes, with the same gradient. When not set: 1024 on a CPU, where more are no faster,
    and 16384 on a GPU.
    """

    remove_unused_columns: bool = False
    """Has to stay off: reward functions receive the dataset's other columns."""

    # --- sampling ---------------------------------------------------------------------------------------------------

    num_completions: int = 2
    """Completions sampled for each prompt (K). How many pairs are formed of them says `pair_selection`."""

    max_new_tokens: int = 64
    """Longest completion, in tokens."""

    max_length: int | None = 512
    """Longest prompt plus completion, in tokens. A prompt is cut on the left, once and before sampling, to
    `max_length - max_new_tokens`. `None`: prompts are not limited by it."""

    max_prompt_length: int | None = None
    """Longest prompt, in tokens; when not set, `max_length - max_new_tokens`."""

    truncate_prompts: bool = True
    """Cut prompts that are too long on the left. When off, such a prompt is invalid: see `invalid_prompts`."""

    temperature: float = 0.9
    """Sampling temperature; above 0."""

    top_p: float = 1.0
    """Sample from the most probable tokens that together reach this probability; in (0, 1], 1 is off."""

    top_k: int = 0
    """Sample from this many most probable tokens; 0 is off."""

    min_p: float | None = None
    """Drop tokens less probable than this share of the most probable one; in [0, 1]."""

    repetition_penalty: float = 1.0
    """Above 1, tokens that already stand in the prompt or the completion become less probable; 1 is off."""

    generation_kwargs: dict[str, Any] | str | None = None
    """Further options of `transformers.GenerationConfig`, such as `{"stop_strings": ["\\n\\n"]}`. They override the
    fields above and are sampled through `model.generate`."""

    cache_implementation: str | None = None
    """Cache that `model.generate` should use, such as `static`. Sampling then goes through `model.generate`."""

    rollout_batch_size: int = 64
    """Most completions that are decoded at the same time. Lower it when sampling runs out of memory; it does not change
    what is sampled."""

    cuda_graphs: bool = True
    """On a GPU, the built-in engine replays its steps as CUDA graphs. Keys and values of as many completions as it
    decodes at a time then stay in memory while training; turn it off where memory is short."""

    max_staleness: int = 0
    """Steps that completions may be behind the weights that are trained on them. With 1 or more, the next steps are
    scored while the present one is trained on (and sampled, with a server of vLLM); 0 waits, so that all training is
    on-policy."""

    sync_check_steps: int = 100
    """Steps between two checks that a sampler with weights of its own (vLLM) has the trainer's; the first is always
    made. 0: no further ones."""

    # --- data -------------------------------------------------------------------------------------------------------

    prompt_column: str | None = None
    """Column that holds the prompt. When not set: `prompt`, else `messages`, else the prompt of a `chosen`
    transcript.
    """

    prompt_template: str | None = None
    """Text of the prompt with column names in braces, such as `"Question: {question}\\nAnswer:"`. Replaces
    `prompt_column`.
    """

    chat_template_kwargs: dict[str, Any] | str | None = None
    """Passed to the chat template of conversational prompts, such as `{"enable_thinking": false}`."""

    invalid_prompts: str = "error"
    """A row that is no usable prompt (empty, wrong type, no room for a completion): `error` stops and names the row,
    `filter` leaves it out and counts it."""

    dataset_num_proc: int | None = None
    """Processes that prepare the dataset."""

    # --- guards -----------------------------------------------------------------------------------------------------

    max_skipped_steps: int = 10
    """A step whose loss or gradient is not finite is skipped; after this many in a row the run saves a checkpoint and
    stops.
    """

    # --- models -----------------------------------------------------------------------------------------------------

    model_init_kwargs: dict[str, Any] | str | None = None
    """Passed to `AutoModelForCausalLM.from_pretrained` when the policy (or the reference) is given by name, for example
    `{"attn_implementation": "sdpa"}`. Without a `dtype`, trained weights are loaded in fp32 and a base under an adapter
    as it was saved; trained weights in half precision lose most of their updates."""

    trust_remote_code: bool = False
    """Allow models and tokenizers that bring their own Python code."""

    ds3_gather_for_generation: bool = True
    """Gather ZeRO-3 shards for sampling. This version does not run under DeepSpeed, see `deepspeed`."""

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _device_computes_in_bf16()
        settle_input(self, choices := CHOICES + feedback.CHOICES + loss.CHOICES + method.CHOICES)
        check_refused(self)
        check_names(self)
        for name, problem in out_of_range(vars(self)):
            raise ValueError(f"`{name}` {problem}")
        copy_checkpointing_fields(self)
        super().__post_init__()
        check_processes(self)
        check_ranges(self)
        check_choices(self, choices)
        check_losses(self)
        check_pairs(self)
        check_resampling(self)
        check_reference(self)
        check_method(self)
        check_target_kl(self)
        check_vllm(self)
        check_generation_kwargs(self.generation_kwargs)
        check_unsupported(self)
        check_accelerator(self)
        check_training(self)

    @classmethod
    def _hint_for_argument(cls, name: str, known: Collection[str]) -> str:
        if name in ARGUMENTS.values():
            return f" `{name}` is an argument of `OnlineDPOTrainer`."
        return hint_for(name, known, IN_PYTHON)

    def beta_at(self, epoch: float) -> float:
        """The beta of an epoch that may be fractional: ``[0.1, 0.2]`` gives 0.1 in epoch 0 and 0.2 from epoch 1 on."""
        return self.at_epoch("beta", epoch)

    def at_epoch(self, name: str, epoch: float) -> float:
        """The same for any of `EPOCH_FIELDS`."""
        value = getattr(self, name)
        return float(value[min(int(epoch), len(value) - 1)] if isinstance(value, (list, tuple)) else value)

    @property
    def loss_types(self) -> list[str]:
        """``loss_type`` as a list."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    @property
    def vllm_server_urls(self) -> list[str]:
        """Addresses of the servers, without blanks and trailing slashes."""
        if self.vllm_server_base_url is None:
            host = "localhost" if self.vllm_server_host == "0.0.0.0" else self.vllm_server_host
            return [f"http://{host}:{self.vllm_server_port}"]
        return [url.strip().rstrip("/") for url in self.vllm_server_base_url.split(",") if url.strip()]

    @property
    def row_capacity(self) -> int:
        """Tokens that rows which share prompts are filled up to; 0 is the largest prompt with its completions."""
        return self.tokens_per_pass if self.flex_attention else 0

    @property
    def tokens_per_pass(self) -> int:
        """``max_tokens_per_pass``, or what suits the device."""
        return self.max_tokens_per_pass or (1024 if self.device.type == "cpu" else 16384)

    @property
    def prompt_limit(self) -> int | None:
        """Most tokens of a prompt, or ``None`` where nothing limits it."""
        by_total = None if self.max_length is None else self.max_length - self.max_new_tokens
        limits = [limit for limit in (self.max_prompt_length, by_total) if limit is not None]
        return min(limits) if limits else None


def _device_computes_in_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
