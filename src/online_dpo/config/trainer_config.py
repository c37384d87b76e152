"""The trainer's configuration: `transformers.TrainingArguments` plus the groups of fields of Online DPO.

Each group stands in a file of its own, with the choices and the checks of its fields. A field is documented once, in
the string beneath it; ``online-dpo train --help`` shows the same text. Fields that TRL's ``OnlineDPOConfig`` has keep
its names.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, fields

import torch
from transformers import TrainingArguments

from online_dpo.config.checking import check_choices
from online_dpo.config.data import DataFields, check_data
from online_dpo.config.engine import EngineFields, engine_name, settle_engine
from online_dpo.config.feedback import FeedbackFields, check_feedback
from online_dpo.config.hf_fields import check_absurd, check_hf_fields, check_names, check_processes
from online_dpo.config.input import MAPPINGS, normalize_input
from online_dpo.config.keyword_arguments import names_unknown_arguments
from online_dpo.config.loss import LossFields, check_loss, without_reference
from online_dpo.config.method import MethodFields, check_method, check_method_numbers, method_of
from online_dpo.config.names_elsewhere import ARGUMENTS, IN_PYTHON, hint_for
from online_dpo.config.recording import RecordingFields, check_recording
from online_dpo.config.sampling import SamplingFields, check_sampling
from online_dpo.config.secrets import WithoutToken, check_tokens
from online_dpo.config.sharding import settle_precision, settle_sharding
from online_dpo.config.training import TrainingFields, check_training
from online_dpo.config.unsupported import check_accelerator, check_generation_kwargs, check_refused, check_unsupported
from online_dpo.config.vllm import VLLMFields, check_vllm, unread_vllm_fields
from online_dpo.distributed.joining import coming_together, join_on_cpu
from online_dpo.distributed.on_cpu import join_deepspeed_on_cpu
from online_dpo.distributed.process_state import environment
from online_dpo.versions import copy_checkpointing_fields


def _hint_for_argument(name: str, known: Collection[str]) -> str:
    if name in ARGUMENTS.values():
        return f" `{name}` is an argument of `OnlineDPOTrainer`."
    return hint_for(name, known, IN_PYTHON)


@names_unknown_arguments(_hint_for_argument)
@dataclass(repr=False)  # the parent's hides tokens
class OnlineDPOConfig(
    WithoutToken,
    VLLMFields,  # dataclasses put the fields of the last base class first
    EngineFields,
    MethodFields,
    LossFields,
    FeedbackFields,
    DataFields,
    SamplingFields,
    RecordingFields,
    TrainingFields,
    TrainingArguments,
):
    """Arguments of :class:`online_dpo.OnlineDPOTrainer`.

    Every field of :class:`transformers.TrainingArguments` is here too. Defaults that differ from it: ``learning_rate``
    5e-7, ``logging_steps`` 10, ``gradient_checkpointing`` on, ``bf16`` on where the device computes in bf16,
    ``remove_unused_columns`` off.

    Raises:
        ValueError: a field is out of range, or asks for something that this version does not do.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *MAPPINGS]

    def __post_init__(self) -> None:
        self.bf16 = settle_precision(self.bf16, self.fp16)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _device_computes_in_bf16()
        normalize_input(self)
        settle_engine(self)
        check_refused(self)
        check_tokens(self.hub_token, self.model_init_kwargs)
        check_names(self)
        copy_checkpointing_fields(self)
        settle_sharding(self)
        # transformers would compare it with the launcher's words, from which it was made
        with coming_together(self.ddp_timeout), environment(ACCELERATE_CONFIG_DS_FIELDS=""):
            if self.use_cpu:
                join_on_cpu(self.ddp_backend, self.ddp_timeout)
            super().__post_init__()
            if self.use_cpu and self.deepspeed:
                join_deepspeed_on_cpu()
        check_processes(self)
        check_choices(self, unread_vllm_fields(self))
        check_sampling(self)
        check_data(self)
        check_training(self)
        check_recording(self)
        check_feedback(self, self.num_completions)
        _check_resampling(self)
        _check_reward_sharding(self)
        check_loss(self)
        check_method_numbers(self)
        check_method(self)
        _check_target_kl(self)
        check_vllm(self)
        check_generation_kwargs(self.generation_kwargs)
        check_absurd(self, {field.name for field in fields(self)})
        check_unsupported(self)
        check_accelerator(self)
        check_hf_fields(self)

    def beta_at(self, epoch: float) -> float:
        """The beta of an epoch that may be fractional: ``[0.1, 0.2]`` gives 0.1 in epoch 0 and 0.2 from epoch 1 on."""
        return self.at_epoch("beta", epoch)

    def at_epoch(self, name: str, epoch: float) -> float:
        """The value of any of `EPOCH_FIELDS` in an epoch, as in `beta_at`."""
        value = getattr(self, name)
        return float(value[min(int(epoch), len(value) - 1)] if isinstance(value, (list, tuple)) else value)

    @property
    def engine_name(self) -> str:
        """``engine``, or the one that `use_vllm` and `vllm_mode` choose."""
        return engine_name(self.engine, self.use_vllm, self.vllm_mode)

    @property
    def tokens_per_pass(self) -> int:
        """``max_tokens_per_pass``, or what suits the device."""
        return self.max_tokens_per_pass or (1024 if self.device.type == "cpu" else 16384)


def _device_computes_in_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _check_resampling(args: OnlineDPOConfig) -> None:
    beside = args.use_vllm and args.vllm_mode == "server"
    if args.resample_rounds and args.max_staleness and not beside:
        raise ValueError(
            "`resample_rounds` with `max_staleness` samples while the policy is trained, which needs "
            '`vllm_mode="server"`. Set one of the two to 0, or sample with a vLLM server.'
        )


def _check_reward_sharding(args: OnlineDPOConfig) -> None:
    if args.reward_model_sharding == "shard" and args.max_staleness:
        raise ValueError(
            '`reward_model_sharding="shard"` gathers reward models over all processes, and `max_staleness` scores '
            "beside training, in no order that processes share. Set `max_staleness` to 0, or leave the reward models "
            "whole."
        )


def _check_target_kl(args: OnlineDPOConfig) -> None:
    """Check that beta can adapt, if `target_kl` is set.

    Raises:
        ValueError: beta is a list, or the loss does not read the reference.
    """
    if args.target_kl is None:
        ignored = [name for name in ("beta_gain", "beta_range") if getattr(args, name) != getattr(type(args), name)]
        if ignored:
            warnings.warn(f"Ignored without `target_kl`: {', '.join(ignored)}.", stacklevel=4)
        return
    if isinstance(args.beta, (list, tuple)):
        raise ValueError("`target_kl` adapts `beta`, so that it cannot be a list by epochs; give one number.")
    needs_reference = method_of(args).needs_reference
    if not needs_reference and set(args.loss_types) <= without_reference():
        raise ValueError(
            f"`target_kl` needs a loss whose beta pulls towards the reference; {args.loss_type!r} reads no reference."
        )
