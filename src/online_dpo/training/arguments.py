"""Checks of the trainer's arguments, made before a model is loaded as far as that is possible."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from online_dpo.config.checking import EPOCH_FIELDS
from online_dpo.config.feedback import HUMAN
from online_dpo.config.hf_fields import check_output_dir
from online_dpo.config.quantization import NEEDS_ADAPTER, check_sharded, quantised_as, settings_of, settings_of_model
from online_dpo.config.requirements import problems
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.modeling.introspection import is_quantized_by_bitsandbytes, unwrapped
from online_dpo.modeling.loading import check_model_path, is_adapter
from online_dpo.modeling.quantization import describe
from online_dpo.rollout.params import SamplingParams
from online_dpo.rollout.vllm.client import VLLMClient
from online_dpo.rollout.vllm.requests import vllm_sampling
from online_dpo.rollout.weights.export import ADAPTERS_ALONE
from online_dpo.scoring.judge_registry import check_judge, registered_judge
from online_dpo.scoring.judges.human import check_patience
from online_dpo.scoring.judges.llm.judge import check_share
from online_dpo.scoring.protocols import ChatTemplateScorer, PointwiseScorer
from online_dpo.scoring.registry import check_reward_columns, check_reward_path, check_scorers
from online_dpo.training.trained import check_trained

REWARD_FIELDS = ("reward_weights", "reward_normalization")
"""Fields that only rewards read."""


def checked_config(args: OnlineDPOConfig | None) -> OnlineDPOConfig:
    """Returns the configuration, once it is known to be one.

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
    """Refuse arguments that are missing, of the wrong kind, or contradict each other.

    Raises:
        ValueError, TypeError: an argument is missing, of the wrong kind, or contradicts another; the message says
            which.
    """
    _check_given(model, train_dataset, processing_class)
    _check_reference_given(model, ref_model, args)
    _check_feedback_given(reward_funcs, judge, args)
    if preprocess_logits_for_metrics is not None:
        raise ValueError(
            "`preprocess_logits_for_metrics` has nothing to work on: evaluation keeps no logits. `compute_metrics` "
            "receives the scores of the policy's completions as `predictions` and of the reference's as `label_ids`."
        )
    if args.model_init_kwargs is not None and not isinstance(model, str):
        raise ValueError("`model_init_kwargs` is only used when `model` is a name or folder, but it is a loaded model.")
    options: Any = args.model_init_kwargs
    quantized = quantization_of(model, options)
    if quantized is not None and peft_config is None and not _holds_adapter(model):
        raise ValueError(f"`model` is quantised ({quantized}) and {NEEDS_ADAPTER} Give a `peft_config`.")
    if quantized is not None:
        check_sharded(_settings_of(model, options), args)
    check_vllm(args, quantized)
    if isinstance(model, nn.Module) and peft_config is None:
        check_trained(model)
    check_output_dir(args)
    if isinstance(model, str):
        check_model_path(model, "model", "policy", options)
    if isinstance(ref_model, str):
        check_model_path(ref_model, "ref_model", "reference", options)
    if peft_config is not None and is_peft_model_object(model):
        raise ValueError("`model` is a PEFT model already; leave `peft_config` out, or give the base model.")
    if reward_funcs is not None:
        check_scorers(reward_funcs, reward_processing_classes, args)


def _check_reference_given(model: Any, ref_model: Any, args: OnlineDPOConfig) -> None:
    if ref_model is model and not isinstance(model, str):
        raise ValueError(
            "`model` and `ref_model` are the same object, so the reference would move with the policy. Leave "
            "`ref_model` out: the trainer keeps a copy of the policy itself."
        )
    if ref_model is not None and args.reference_free:
        raise ValueError(
            "A `ref_model` is given, but with `reference_free=True` nothing reads it. Leave one of them out."
        )


def _check_feedback_given(reward_funcs: Any, judge: Any, args: OnlineDPOConfig) -> None:
    if reward_funcs is None and judge is None:
        raise ValueError("Nothing scores the completions: give `reward_funcs`, `reward_model` or `judge`.")
    if judge is not None:
        check_judged_pairs(args)
        check_judge(judge, "judge")
        check_share(judge, args.world_size)
        if judge == HUMAN:
            check_patience(args)


def _check_given(model: Any, train_dataset: Any, processing_class: Any) -> None:
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


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """Returns the tokenizer: ``processing_class`` itself, or that of a processor."""
    return getattr(processing_class, "tokenizer", processing_class)


def check_judged_pairs(args: OnlineDPOConfig) -> None:
    """Refuse options of pairs that need scores where a judge makes the pairs.

    Raises:
        ValueError: an option needs scores, and a judge forms the pairs.
    """
    if args.pair_selection != "best_worst":
        raise ValueError(
            f"`pair_selection={args.pair_selection!r}` needs scores to make the pairs; a judge goes with 'best_worst'."
        )
    for name in ("min_margin", "max_margin", "margin_weighting", "label_temperature"):
        if getattr(args, name):
            raise ValueError(f"`{name}` needs scores to make the pairs; those of a judge have probabilities.")


def quantization_of(model: Any, options: Mapping[str, Any] | None) -> str | None:
    """Returns how a model is quantised, or will be when it is loaded; ``None`` if it can be trained without adapter."""
    if isinstance(model, str):
        return quantised_as(model, options)
    return describe(model) if isinstance(model, nn.Module) and is_quantized_by_bitsandbytes(model) else None


def _settings_of(model: Any, options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if isinstance(model, str):
        return settings_of_model(model, options)
    return settings_of({"quantization_config": unwrapped(model).config.quantization_config})


def _holds_adapter(model: Any) -> bool:
    return is_adapter(model) if isinstance(model, str) else is_peft_model_object(model)


def is_peft_model_object(model: Any) -> bool:
    """Says whether an object is a PEFT model; a path or anything else is none."""
    return isinstance(model, nn.Module) and bool(is_peft_model(model))


def choose_scorers(reward_funcs: Any, reward_model: Any, judge: Any, args: OnlineDPOConfig) -> tuple[Any, Any]:
    """Returns the reward functions and the judge that are used.

    ``reward_model`` is another name for ``reward_funcs``. Where both rewards and a judge are given, the rewards are
    used, unless ``judge_top`` has the judge compare the best completions.

    Raises:
        ValueError: rewards are given in two places, or the judge is to see the best of them and one is missing.
    """
    rewards = _rewards_given(reward_funcs, reward_model, args)
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
    ignored = [name for name in REWARD_FIELDS if getattr(args, name) != getattr(type(args), name)]
    if rewards is None and ignored:
        warnings.warn(f"Ignored without a reward: {', '.join(ignored)}.", stacklevel=3)
    return rewards, registered_judge(judge)


def _rewards_given(reward_funcs: Any, reward_model: Any, args: OnlineDPOConfig) -> Any:
    if reward_funcs is not None and reward_model is not None:
        raise ValueError("Give `reward_funcs` or `reward_model`, not both: `reward_funcs` takes a list of all of them.")
    rewards = reward_funcs if reward_funcs is not None else reward_model
    check_reward_path(rewards, args.reward_model_path, "reward_model_path", "reward_funcs")
    return args.reward_model_path if rewards is None else rewards


def longest_sequence(args: OnlineDPOConfig) -> int | None:
    """Most tokens of a prompt and its completion; ``None``: any number."""
    return None if args.prompt_limit is None else args.prompt_limit + args.max_new_tokens


def check_vllm(args: OnlineDPOConfig, quantized: str | None = None) -> None:
    """Refuse to sample with vLLM where it cannot be used, or not as the configuration asks.

    Args:
        quantized: how the policy's weights are quantised, if they are.

    Raises:
        ValueError: vLLM is missing, does not know an option of sampling, or a server has no room for ``max_length``.
        RolloutServerError: a server cannot be reached.
    """
    if not args.use_vllm:
        return
    vllm_sampling(SamplingParams.from_config(args, end_token_ids=()))
    if args.vllm_mode == "server":
        for url in args.vllm_server_urls:
            client = VLLMClient(url, args.vllm_server_timeout)
            _check_server(client, longest_sequence(args))
            if quantized is not None and set(client.rpc("online_dpo_lora_rank")) == {"0"}:
                raise ValueError(f"{url} takes whole weights. {ADAPTERS_ALONE}")
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


def check_stream(args: OnlineDPOConfig) -> None:
    """Refuse a configuration that needs epochs for a stream, which has none.

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
    """Refuse a dataset that does not fill one batch, where incomplete ones are dropped.

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
    """The datasets to evaluate on, by the names that errors give them."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def check_columns(reward_funcs: Any, datasets: Mapping[str, Any], not_passed_on: Sequence[str]) -> None:
    """Refuse reward functions that name a column which a prepared dataset does not have.

    Raises:
        ScoringError: a reward function names a column that one of the prepared datasets does not have. A stream may not
        know its columns; it is checked when the function is called.
    """
    if reward_funcs is None:
        return
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset):
            columns = [column for column in dataset.column_names if column not in not_passed_on]
            check_reward_columns(reward_funcs, columns, f"`{name}`")


def check_templates(scorers: Sequence[PointwiseScorer], dataset: Any) -> None:
    """Check that scorers with a chat template of their own can render the prompts, if these are messages.

    Raises:
        ValueError: the prompts are messages, and a reward model's tokenizer has no chat template for them.
    """
    if isinstance(dataset, Dataset) and not isinstance(dataset[0]["prompt"], str):
        for scorer in scorers:
            if isinstance(scorer, ChatTemplateScorer):
                scorer.check_chat_template()
