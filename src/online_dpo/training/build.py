"""Builds the parts of the trainer from its arguments: policy, reference, sampler."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.config.training import unfit_for_flex_attention
from online_dpo.distributed.loading import loading_whole
from online_dpo.distributed.sharding import Sharding
from online_dpo.distributed.weights import make_whole
from online_dpo.evaluation.evaluator import ReferenceAnswers
from online_dpo.foreign import loading
from online_dpo.modeling.adapters import adapting
from online_dpo.modeling.attention.choice import choose_attention
from online_dpo.modeling.introspection import end_token_ids, unwrapped
from online_dpo.modeling.known_tokens import VocabularyCheck, check_reference, check_room, embedding_rows
from online_dpo.modeling.loaded import check_not_zero
from online_dpo.modeling.loading import disable_dropout, is_adapter, load_causal_lm, to_device
from online_dpo.modeling.logprobs import enable_logprobs
from online_dpo.modeling.malloc import keep_freed_memory
from online_dpo.modeling.precision import (
    check_precision,
    given_dtype,
    hold_linears,
    mixed_precision,
    train_in_fp32,
    warn_of_other_dtype,
)
from online_dpo.modeling.quantization import check_biases, keep_differentiable, ready_for_adapter
from online_dpo.modeling.reference import (
    AdapterOffReference,
    FrozenReference,
    NoReference,
    Reference,
    SyncedReference,
    adapter_changes_output,
    frozen_copy,
    trains_base_weights,
)
from online_dpo.modeling.tokenizers import check_same_words
from online_dpo.rollout.params import SamplingParams
from online_dpo.rollout.registry import build_engine, built_in_engine
from online_dpo.rollout.sampler import Sampler
from online_dpo.rollout.sync_check import SyncCheck
from online_dpo.training.arguments import is_peft_model_object, longest_sequence
from online_dpo.training.policy_checks import check_unmerged, warn_of_auxiliary_loss
from online_dpo.training.same_run import check_same_weights
from online_dpo.training.trained import check_trained

logger = logging.getLogger(__name__)


def build_policy(model: Any, peft_config: Any, args: OnlineDPOConfig, optimizer: Any = None) -> nn.Module:
    """Returns the policy, loaded if given by name, wrapped in its adapter, without dropout if so configured.

    The trained weights of a model that is loaded here are in fp32, unless a type is asked for.

    Args:
        optimizer: the user's, if there is one.

    Raises:
        ValueError: the model is no causal language model, its context is shorter than ``max_length``, or none of its
            weights is trained by the optimizer.
    """
    loaded_here = isinstance(model, str)
    typed = given_dtype(args.model_init_kwargs) is not None
    trains_adapter = peft_config is not None
    if loaded_here:
        model = _load_policy(model, peft_config, args)
        trains_adapter = trains_adapter or is_peft_model_object(model)
    else:
        make_whole(model)
    if model.config.is_encoder_decoder:
        raise ValueError("`model` is an encoder-decoder; Online DPO here trains decoder-only language models.")
    check_room(model, longest_sequence(args), "model")
    keep_differentiable(model, "model")
    if peft_config is not None:
        model = _with_adapter(model, peft_config)
    if is_peft_model_object(model):
        _check_adapter(model)
    check_biases(model)
    if trains_adapter:
        train_in_fp32(model, args, may_hold_all=loaded_here and not typed)
    check_trained(model, optimizer)
    check_precision(model, args, optimizer, loaded_here)
    warn_of_auxiliary_loss(model)
    enable_logprobs(model)
    if args.disable_dropout:
        if getattr(peft_config, "lora_dropout", 0.0):
            warnings.warn("`lora_dropout` has no effect: `disable_dropout` is on.", stacklevel=3)
        disable_dropout(model)
    _prepare_attention(model, args, "the policy", trains=True)
    return model


def _load_policy(path: str, peft_config: Any, args: OnlineDPOConfig) -> nn.Module:
    init_kwargs: Any = args.model_init_kwargs
    dtype = policy_dtype(path, peft_config, args)
    with loading(path), loading_whole():
        model = load_causal_lm(path, init_kwargs, args.trust_remote_code, dtype)
        check_not_zero(model, path)
        return model


def _with_adapter(model: Any, peft_config: Any) -> nn.Module:
    from peft import get_peft_model

    model = ready_for_adapter(model)
    with adapting():
        return get_peft_model(model, copy.deepcopy(peft_config))  # it writes into it


def _check_adapter(model: Any) -> None:
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "Adapters with virtual tokens (prompt and prefix tuning) are not supported: with padding their tokens get "
            "other positions than without. Use LoRA."
        )
    check_unmerged(model)


def policy_dtype(path: str, peft_config: Any, args: OnlineDPOConfig) -> str | torch.dtype:
    """The type that a policy is loaded in if none is asked for: fp32 if its own weights are trained, else as saved."""
    quantized = "quantization_config" in (args.model_init_kwargs or {})
    return "auto" if peft_config is not None or quantized or is_adapter(path) else torch.float32


def _prepare_attention(model: nn.Module, args: OnlineDPOConfig, name: str, trains: bool = False) -> None:
    unfit = unfit_for_flex_attention(args)
    choose_attention(model, name, args.device, args.share_prompts, args.flex_attention, unfit, trains)


def build_reference(ref_model: Any, policy: nn.Module, args: OnlineDPOConfig, sharding: Sharding) -> Reference:
    """Returns the reference: the model given, else the policy with its adapter off, else a frozen copy. A reference
    with weights of its own may follow the policy.

    One that is created here computes as the policy does, so that both give the same numbers at the start: it has the
    policy's type, except for what mixed precision casts in each pass anyway.

    Args:
        sharding: shards a reference with weights of its own as the policy will be.

    Raises:
        ValueError: it is to follow the policy, and cannot; or its context is shorter than ``max_length``.
    """
    if args.reference_free:
        return NoReference()
    if ref_model is not None:
        given = _given_reference(ref_model, policy, args)
        return _own_model(given, policy, args, "a model given separately", sharding)
    if args.sync_ref_model and is_peft_model_object(policy):
        raise ValueError(
            "`sync_ref_model` needs a reference with weights of its own, and with an adapter the reference is the "
            "policy without it. Train all weights, or leave it off."
        )
    if is_peft_model_object(policy):
        return _reference_without_adapter(policy, args, sharding)
    copy = frozen_copy(policy)
    if not args.sync_ref_model:  # one that follows is mixed in fp32
        hold_linears(copy, args)
    return _own_model(copy, policy, args, "a frozen copy of the policy", sharding)


def _given_reference(ref_model: Any, policy: nn.Module, args: OnlineDPOConfig) -> nn.Module:
    """The reference that the user gave, loaded if given by name, ready to read rows on the device."""
    if isinstance(ref_model, str):
        init_kwargs: Any = args.model_init_kwargs
        with loading(ref_model), loading_whole():
            path = ref_model
            ref_model = load_causal_lm(path, init_kwargs, args.trust_remote_code, unwrapped(policy).dtype)
            check_not_zero(ref_model, path)
        if not args.sync_ref_model:
            hold_linears(ref_model, args)
    else:
        make_whole(ref_model)
        warn_of_other_dtype(ref_model, policy)
    check_room(ref_model, longest_sequence(args), "ref_model")
    keep_differentiable(ref_model, "ref_model")  # so that it computes as the policy does
    enable_logprobs(ref_model)
    _prepare_attention(ref_model, args, "the reference")
    return ref_model


def _reference_without_adapter(policy: nn.Module, args: OnlineDPOConfig, sharding: Sharding) -> Reference:
    with mixed_precision(args):
        changed = adapter_changes_output(policy)
    if changed:
        logger.warning(
            "The policy's adapter has been trained before. The reference is the base model without it; to stay close "
            "to the policy as it is now, merge the adapter first (merge_and_unload) or pass `ref_model`."
        )
    if trains_base_weights(policy):
        logger.warning(
            "Weights outside the adapter are trained as well (its `bias`, or weights that are not frozen). So the "
            "reference is a copy of the policy with its adapter off, which takes as much memory again."
        )
        reference = AdapterOffReference(frozen_copy(policy), "a copy of the policy with its adapter off")
        reference.model = reference.policy
        _place(reference.policy, args, sharding)
        return reference
    return AdapterOffReference(policy)


def _place(model: nn.Module, args: OnlineDPOConfig, sharding: Sharding) -> None:
    """Puts a frozen model onto the device, each rank's part of it if the policy will be sharded."""
    if sharding.partial:
        check_same_weights(model, "reference")
    else:
        to_device(model, args.device)
    sharding.shard_frozen(model)


def _own_model(
    model: nn.Module, policy: nn.Module, args: OnlineDPOConfig, description: str, sharding: Sharding
) -> Reference:
    _place(model, args, sharding)
    if not args.sync_ref_model:
        return FrozenReference(model, description)
    alpha, every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
    return SyncedReference(model, policy, alpha, every, description)


def train_on_one_device_per_process(args: OnlineDPOConfig) -> None:
    """Sets what holds for every run: one device a process, and batches that each process reads for itself."""
    if args.n_gpu > 1:
        warnings.warn(
            f"{args.n_gpu} GPUs are visible to this one process; only the first is used. Start one process for each "
            f"with `torchrun --nproc_per_node {args.n_gpu}` to use them all.",
            stacklevel=3,
        )
        args._n_gpu = 1
    if args.full_determinism:  # cuBLAS reads it at its first product, which may be before transformers sets the same
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # memory is pinned for a copy to a GPU; without one torch warns
        keep_freed_memory()
    accelerator_config: Any = args.accelerator_config
    if accelerator_config.dispatch_batches is None:
        # A streamed batch holds text, which accelerate cannot broadcast from the first process.
        accelerator_config.dispatch_batches = False


def build_vocabulary(
    policy: nn.Module,
    reference: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
    datasets: Mapping[str, Any],
) -> VocabularyCheck:
    """Returns the check that every model knows the tokens which it reads.

    Args:
        reference: a reference that was given separately and may know other tokens than the policy.

    Raises:
        UnknownTokenError: the reference does not know tokens of the prompts, or that the policy can write.
    """
    if reference is None:
        return VocabularyCheck({"the policy": embedding_rows(policy)})
    with reference.active() as model:
        check_same_words(model, tokenizer)
        check_reference(model, policy, tokenizer, datasets)
        return VocabularyCheck({"the policy": embedding_rows(policy), "the reference": embedding_rows(model)})


def build_sampler(
    policy: nn.Module,
    vocabulary: VocabularyCheck,
    tokenizer: PreTrainedTokenizerBase,
    args: OnlineDPOConfig,
    accelerator: Accelerator,
) -> Sampler:
    """Returns the sampler of the policy's completions."""
    return Sampler(
        policy,
        build_engine(policy, tokenizer, args),
        SamplingParams.from_config(args, end_token_ids(policy, tokenizer)),
        vocabulary,
        SyncCheck(accelerator.device, args.sync_check_steps),
        lambda: args.seed,
        lambda: accelerator.autocast(),
    )


def build_reference_answers(
    reference: Reference, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig
) -> ReferenceAnswers | None:
    """Returns the source of the reference's answers in evaluations; ``None`` without a reference."""
    if args.reference_free:
        return None
    with reference.active() as model:
        return ReferenceAnswers(reference, built_in_engine(model, tokenizer, args), sampler)
