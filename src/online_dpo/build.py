"""From the trainer's arguments to the parts it composes. Everything that can be wrong is found before a model is
loaded.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from online_dpo.allocator import keep_freed_memory
from online_dpo.attention import use_flex_attention, use_segments
from online_dpo.config import OnlineDPOConfig
from online_dpo.config_checks import EPOCH_FIELDS
from online_dpo.config_checks_training import check_output_dir
from online_dpo.foreign import loading
from online_dpo.known_tokens import check_room
from online_dpo.logprobs import enable_logprobs
from online_dpo.models import (
    adapting,
    check_model_path,
    disable_dropout,
    is_adapter,
    load_causal_lm,
    to_device,
    unwrapped,
)
from online_dpo.policy_checks import check_unmerged, warn_of_auxiliary_loss
from online_dpo.precision import (
    check_precision,
    given_dtype,
    hold_linears,
    mixed_precision,
    train_in_fp32,
    warn_of_other_dtype,
)
from online_dpo.reference import (
    AdapterOffReference,
    FrozenReference,
    NoReference,
    Reference,
    SyncedReference,
    adapter_changes_output,
    frozen_copy,
    trains_base_weights,
)
from online_dpo.requirements import problems
from online_dpo.rollout import Engine, SamplingParams, TransformersEngine
from online_dpo.rollout.mixture import MixtureEngine
from online_dpo.rollout.opponent import ModelOpponent, Nobody, Opponent
from online_dpo.rollout.vllm_client import VLLMClient
from online_dpo.rollout.vllm_colocate import VLLMColocateEngine
from online_dpo.rollout.vllm_requests import vllm_sampling
from online_dpo.rollout.vllm_server import VLLMServerEngine
from online_dpo.scoring import (
    PointwiseScorer,
    RewardModelScorer,
    check_judge,
    check_reward_columns,
    check_reward_path,
    check_scorers,
    check_share,
)
from online_dpo.trained import check_trained

logger = logging.getLogger(__name__)

REWARD_FIELDS = ("reward_weights", "reward_normalization")
"""Fields that only rewards read."""


def checked_config(args: OnlineDPOConfig | None) -> OnlineDPOConfig:
    """
    Raises:
        ValueError, TypeError: there is no configuration, or it is of another kind.
    """
    if args is None:
        raise ValueError("`args` must be given: an `OnlineDPOConfig` with at least `output_dir`.")
    if not isinstance(args, OnlineDPOConfig):
        raise TypeError(f"`args` must be an `OnlineDPOConfig`; it is a {type(args).__name__}.")
    return args


def check_arguments(
    *,
    model: Any,
    ref_model: Any,
    reward_funcs: Any,
    judge: Any,
    args: OnlineDPOConfig,
    train_dataset: Any,
    processing_class: Any,
    reward_processing_classes: Any,
    peft_config: Any,
    preprocess_logits_for_metrics: Any,
) -> None:
    """
    Raises:
        ValueError, TypeError: an argument is missing, of the wrong kind, or contradicts another; the message says
            which.
    """
    if train_dataset is None:
        raise ValueError("`train_dataset` must be given: a dataset with a `prompt` column.")
    if processing_class is None:
        raise ValueError("`processing_class` must be given: the policy's tokenizer.")
    if not isinstance(processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
        raise TypeError(
            "`processing_class` must be a tokenizer or a processor with one; it is a "
            f"{type(processing_class).__name__}."
        )
    if model is None:
        raise ValueError("`model` must be given: a causal language model, its folder or its hub name.")
    if ref_model is model and not isinstance(model, str):
        raise ValueError(
            "`model` and `ref_model` are the same object, so the reference would move with the policy. Leave "
            "`ref_model` out: the trainer keeps a copy of the policy itself."
        )
    if ref_model is not None and args.reference_free:
        raise ValueError(
            "A `ref_model` is given, but with `reference_free=True` nothing reads it. Leave one of them out."
        )
    if reward_funcs is None and judge is None:
        raise ValueError("Nothing scores the completions: give `reward_funcs`, `reward_model` or `judge`.")
    if judge is not None:
        check_judged_pairs(args)
        check_judge(judge, "judge")
        check_share(judge, args.world_size)
    if preprocess_logits_for_metrics is not None:
        raise ValueError(
            "`preprocess_logits_for_metrics` has nothing to work on: evaluation keeps no logits. `compute_metrics` "
            "receives the scores of the policy's completions as `predictions` and of the reference's as `label_ids`."
        )
    if args.model_init_kwargs is not None and not isinstance(model, str):
        raise ValueError("`model_init_kwargs` is only used when `model` is a name or folder, but it is a loaded model.")
    check_vllm(args)
    if isinstance(model, nn.Module) and peft_config is None:
        check_trained(model)
    check_output_dir(args)
    for argument, value in (("model", model), ("ref_model", ref_model)):
        if isinstance(value, str):
            check_model_path(value, argument)
    if peft_config is not None and is_peft_model_object(model):
        raise ValueError("`model` is a PEFT model already; leave `peft_config` out, or give the base model.")
    if reward_funcs is not None:
        check_scorers(reward_funcs, reward_processing_classes, args)


def check_judged_pairs(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: pairs are to be made by scores, and a judge makes them.
    """
    if args.pair_selection != "best_worst":
        raise ValueError(
            f"`pair_selection={args.pair_selection!r}` needs scores to make the pairs; a judge goes with 'best_worst'."
        )
    for name in ("min_margin", "max_margin", "margin_weighting", "label_temperature"):
        if getattr(args, name):
            raise ValueError(f"`{name}` needs scores to make the pairs; those of a judge have probabilities.")


def is_peft_model_object(model: Any) -> bool:
    return isinstance(model, nn.Module) and bool(is_peft_model(model))


def choose_scorers(reward_funcs: Any, reward_model: Any, judge: Any, args: OnlineDPOConfig) -> tuple[Any, Any]:
    """The reward functions and the judge that are used: ``reward_model`` is another name for ``reward_funcs``, and
    rewards win unless the judge is for the best of them.

    Raises:
        ValueError: rewards are given in two places, or the judge is to see the best of them and one is missing.
    """
    if reward_funcs is not None and reward_model is not None:
        raise ValueError("Give `reward_funcs` or `reward_model`, not both: `reward_funcs` takes a list of all of them.")
    rewards = reward_funcs if reward_funcs is not None else reward_model
    check_reward_path(rewards, args.reward_model_path, "reward_model_path", "reward_funcs")
    if rewards is None:
        rewards = args.reward_model_path
    if args.judge_top is not None:
        if rewards is None or judge is None:
            missing = "`judge`" if judge is None else "reward (`reward_funcs`, `reward_model_path`)"
            raise ValueError(f"`judge_top` shows a judge the best completions by a reward: give a {missing} as well.")
    elif rewards is not None and judge is not None:
        warnings.warn(
            "Both a reward and a `judge` are given: the reward is used, the judge is not. With `judge_top` the judge "
            "compares the best completions by the reward.",
            stacklevel=3,
        )
        judge = None
    if rewards is None:
        ignored = [name for name in REWARD_FIELDS if getattr(args, name) != getattr(type(args), name)]
        if ignored:
            warnings.warn(f"Ignored without a reward: {', '.join(ignored)}.", stacklevel=3)
    return rewards, judge


def build_policy(model: Any, peft_config: Any, args: OnlineDPOConfig, optimizer: Any = None) -> nn.Module:
    """The policy, loaded if given by name, wrapped in its adapter, without dropout if so configured. What is trained of
    a model loaded here is in fp32, unless a type is asked for.

    Args:
        optimizer: of the user, if there is one.

    Raises:
        ValueError: the model is no causal language model, its context is shorter than ``max_length``, or none of its
            weights is trained by the optimizer.
    """
    loaded_here = isinstance(model, str)
    typed = given_dtype(args.model_init_kwargs) is not None
    if isinstance(model, str):
        dtype = policy_dtype(model, peft_config, args)
        with loading(model):
            model = load_causal_lm(model, args.model_init_kwargs, args.trust_remote_code, dtype)  # pyright: ignore[reportArgumentType]
        trains_adapter = peft_config is not None or is_peft_model_object(model)
    else:
        trains_adapter = peft_config is not None
    if model.config.is_encoder_decoder:
        raise ValueError("`model` is an encoder-decoder; Online DPO here trains decoder-only language models.")
    check_room(model, _longest(args), "model")
    if peft_config is not None:
        from peft import get_peft_model, prepare_model_for_kbit_training

        if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
            # Trainer turns checkpointing on, as the run asks for it
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        with adapting():
            model = get_peft_model(model, copy.deepcopy(peft_config))  # it writes into it
    if is_peft_model_object(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "Adapters with virtual tokens (prompt and prefix tuning) are not supported: with padding their tokens get "
            "other positions than without. Use LoRA."
        )
    if is_peft_model_object(model):
        check_unmerged(model)
    if trains_adapter:
        train_in_fp32(model, args, may_hold_all=loaded_here and not typed)
    check_trained(model, optimizer)
    check_precision(model, args, optimizer, loaded_here)
    warn_of_auxiliary_loss(model)
    _prepare_attention(model, args)
    enable_logprobs(model)
    if args.disable_dropout:
        if getattr(peft_config, "lora_dropout", 0.0):
            warnings.warn("`lora_dropout` has no effect: `disable_dropout` is on.", stacklevel=3)
        disable_dropout(model)
    return model


def policy_dtype(path: str, peft_config: Any, args: OnlineDPOConfig) -> str | torch.dtype:
    """The type that a policy is loaded in if none is asked for: fp32 if its own weights are trained, else as saved."""
    quantized = "quantization_config" in (args.model_init_kwargs or {})
    return "auto" if peft_config is not None or quantized or is_adapter(path) else torch.float32


def _prepare_attention(model: nn.Module, args: OnlineDPOConfig) -> None:
    if args.flex_attention:
        use_flex_attention(model)
    elif args.share_prompts and args.device.type == "cpu":
        use_segments(model)


def _longest(args: OnlineDPOConfig) -> int | None:
    """Most tokens of a prompt and its completion; ``None``: any number."""
    return None if args.prompt_limit is None else args.prompt_limit + args.max_new_tokens


def build_reference(ref_model: Any, policy: nn.Module, args: OnlineDPOConfig) -> Reference:
    """The reference: the model given, else the policy with its adapter off, else a frozen copy. A model of its own may
    follow the policy.

    One that is made here computes as the policy does, so that at the start the two give the same numbers: it has the
    policy's type, but for what mixed precision casts in each pass anyway.

    Raises:
        ValueError: it is to follow the policy, and cannot; or its context is shorter than ``max_length``.
    """
    if args.reference_free:
        return NoReference()
    if isinstance(ref_model, str):
        init_kwargs: Any = args.model_init_kwargs
        with loading(ref_model):
            ref_model = load_causal_lm(ref_model, init_kwargs, args.trust_remote_code, unwrapped(policy).dtype)
        if not args.sync_ref_model:
            hold_linears(ref_model, args)
    elif ref_model is not None:
        warn_of_other_dtype(ref_model, policy)
    if ref_model is not None:
        check_room(ref_model, _longest(args), "ref_model")
        enable_logprobs(ref_model)
        _prepare_attention(ref_model, args)
        return _own_model(to_device(ref_model, args.device), policy, args, "a model given separately")
    if args.sync_ref_model and is_peft_model_object(policy):
        raise ValueError(
            "`sync_ref_model` needs a reference with weights of its own, and with an adapter the reference is the "
            "policy without it. Train all weights, or leave it off."
        )
    if not is_peft_model_object(policy):
        copy = frozen_copy(policy)
        if not args.sync_ref_model:  # one that follows is mixed in fp32
            hold_linears(copy, args)
        return _own_model(to_device(copy, args.device), policy, args, "a frozen copy of the policy")
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
        return AdapterOffReference(frozen_copy(policy), "a copy of the policy with its adapter off")
    return AdapterOffReference(policy)


def _own_model(model: nn.Module, policy: nn.Module, args: OnlineDPOConfig, description: str) -> Reference:
    if not args.sync_ref_model:
        return FrozenReference(model, description)
    alpha, every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
    return SyncedReference(model, policy, alpha, every, description)


def check_vllm(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: vLLM is missing, does not know an option of sampling, or a server has not room for ``max_length``.
        RolloutServerError: a server cannot be reached.
    """
    if not args.use_vllm:
        return
    vllm_sampling(SamplingParams.from_config(args, end_token_ids=()))
    if args.vllm_mode == "server":
        for url in args.vllm_server_urls:
            _check_server(VLLMClient(url, args.vllm_server_timeout), _longest(args))
    else:
        for _, problem in problems({"use_vllm": True}):
            raise ValueError(problem)


def _check_server(client: VLLMClient, longest: int | None) -> None:
    client.call("/health")
    room = client.call("/v1/models")["data"][0]["max_model_len"]
    if room is not None and (longest is None or longest > room):
        raise ValueError(
            f"The vLLM server at {client.url} has room for {room} tokens, prompts and completions may have "
            f"{'any number' if longest is None else longest}. Set `max_length` to at most {room}, or start the server "
            "with a larger `--max-model-len`."
        )


def build_engine(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> Engine:
    """What samples completions: the policy itself, or vLLM in this process or as servers.

    Raises:
        ValueError: vLLM is not installed, or its options do not fit this machine.
        RolloutServerError: a server cannot be reached, or takes no weights.
    """
    if not args.use_vllm:
        return built_in_engine(policy, tokenizer, args)
    if args.vllm_mode == "colocate":
        return VLLMColocateEngine(policy, tokenizer, args)
    return VLLMServerEngine(args.vllm_server_urls, tokenizer, args)


def built_in_engine(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> TransformersEngine:
    """Samples from this model itself."""
    static_steps = None if args.cuda_graphs else False
    return TransformersEngine(model, tokenizer, args.rollout_batch_size, static_steps=static_steps)


def build_opponent(
    policy: nn.Module,
    reference: Reference,
    tokenizer: PreTrainedTokenizerBase,
    args: OnlineDPOConfig,
    epoch: Callable[[], float],
) -> Opponent:
    """Whose completion the policy's is compared with: nobody's but its own, the reference's, or that of a mixture.

    Raises:
        ValueError: policy and reference cannot be mixed.
    """
    if args.method == "online_dpo":
        return Nobody()
    if args.method == "xpo":
        with reference.active() as model:
            return ModelOpponent(built_in_engine(model, tokenizer, args), "reference", reference.active)

    def share() -> float:
        return args.at_epoch("mixture_coef", epoch())

    return ModelOpponent(MixtureEngine(policy, reference.active, share, tokenizer, args.rollout_batch_size), "mixture")


def check_stream(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: the configuration needs epochs, and a stream that is read again and again has none.
    """
    if args.max_steps <= 0:
        raise ValueError("A streamed `train_dataset` needs `max_steps`: its length is not known.")
    for name in EPOCH_FIELDS:
        if isinstance(getattr(args, name), (list, tuple)):
            raise ValueError(
                f"A list of `{name}`s goes by epochs, and a streamed `train_dataset` has none; give one number."
            )


def check_batches(train_dataset: Any, args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: the rows make no whole batch, and others are left out.
    """
    needed = args.per_device_train_batch_size * args.world_size
    if isinstance(train_dataset, Dataset) and args.dataloader_drop_last and len(train_dataset) < needed:
        raise ValueError(
            f"Nothing to train: `train_dataset` has {len(train_dataset)} rows, a batch needs {needed} "
            "(`per_device_train_batch_size` times processes), and `dataloader_drop_last` leaves out a smaller one."
        )


def named_datasets(eval_dataset: Any) -> dict[str, Any]:
    """The datasets to evaluate on, each as an error should call it."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def check_columns(reward_funcs: Any, datasets: Mapping[str, Any], not_passed_on: Sequence[str]) -> None:
    """
    Raises:
        ScoringError: a reward function names a column that one of the prepared datasets has not. A stream may not know
            its columns; it is checked when the function is called.
    """
    if reward_funcs is None:
        return
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset):
            columns = [column for column in dataset.column_names if column not in not_passed_on]
            check_reward_columns(reward_funcs, columns, f"`{name}`")


def check_templates(scorers: Sequence[PointwiseScorer], dataset: Any) -> None:
    """
    Raises:
        ValueError: the prompts are messages, and a reward model's tokenizer has no chat template for them.
    """
    if isinstance(dataset, Dataset) and not isinstance(dataset[0]["prompt"], str):
        for scorer in scorers:
            if isinstance(scorer, RewardModelScorer):
                scorer.check_chat_template()


def train_on_one_device_per_process(args: OnlineDPOConfig) -> None:
    """Settings that hold for every run: one device a process, and batches that each process reads for itself."""
    if args.n_gpu > 1:
        warnings.warn(
            f"{args.n_gpu} GPUs are visible to this one process; only the first is used. Start one process for each "
            f"with `torchrun --nproc_per_node {args.n_gpu}` to use them all.",
            stacklevel=3,
        )
        args._n_gpu = 1
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # memory is pinned for a copy to a GPU; without one torch warns
        keep_freed_memory()
    accelerator_config: Any = args.accelerator_config
    if accelerator_config.dispatch_batches is None:
        # A streamed batch holds text, which accelerate cannot broadcast from the first process.
        accelerator_config.dispatch_batches = False
