"""Fields of `transformers.TrainingArguments` that have no meaning here, or would break a promise of a run: they are
refused, not ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from transformers import GenerationConfig, TrainingArguments

from online_dpo.config.training import unfit_for_flex_attention

FUSED_OPTIMIZERS = ("lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise")
FUSED_OPTIMIZERS += ("galore_adafactor_layerwise", "apollo_adamw_layerwise")
LENGTH_STRATEGIES = ("group_by_length", "batch_rebalance")
NO_CAST_POLICY = (
    "`bf16_full_eval` and `fp16_full_eval` cast the policy itself. Leave them off: with `bf16` or `fp16` evaluation "
    "computes in that type."
)


def _is_set(value: Any) -> bool:
    return value is not None


REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "neftune_noise_alpha",
        _is_set,
        "`neftune_noise_alpha` adds noise by the length of a row, but rows here hold several completions; and policy "
        "and reference would be compared with and without noise. Leave it unset.",
    ),
    (
        "use_liger_kernel",
        lambda value: value is True,
        "`use_liger_kernel` replaces the policy's `forward` when training begins, where the trainer has its own; "
        "logits exist for a few hundred tokens at a time without it. Leave it off.",
    ),
    (
        "optim",
        lambda value: value in FUSED_OPTIMIZERS,
        "`optim={value!r}` updates weights during the backward pass, so that a step that is not finite could not be "
        "skipped, and passes would not add up. Use another, such as `adamw_torch` or `galore_adamw`.",
    ),
    (
        "train_sampling_strategy",
        lambda value: value in LENGTH_STRATEGIES,
        "`train_sampling_strategy={value!r}` goes by the length of texts, which is unknown before they are sampled; "
        "rows are packed by tokens anyway. Use `random` or `sequential`.",
    ),
    ("bf16_full_eval", bool, NO_CAST_POLICY),
    ("fp16_full_eval", bool, NO_CAST_POLICY),
    (
        "average_tokens_across_devices",
        lambda value: not value,
        "`average_tokens_across_devices` must be True: the loss is a mean over the pairs of all processes.",
    ),
    (
        "label_names",
        _is_set,
        "`label_names` has nothing to name: there are no labels. `compute_metrics` receives the reference's scores as "
        "`label_ids`.",
    ),
    (
        "parallelism_config",
        _is_set,
        "`parallelism_config` is not in this version. Use several processes without it (torchrun).",
    ),
)
"""Fields that are refused, which of their values, and why; ``{value}`` is the value."""


def check_refused(args: TrainingArguments) -> None:
    """Check fields that are refused, before transformers reads them.

    Raises:
        ValueError: one of them is set; the message says why not, and what there is instead.
    """
    for name, refuses, message in REFUSED:
        value = getattr(args, name)
        if name == "optim":
            value = getattr(value, "value", value)  # transformers makes a member of an enumeration of its name
        if refuses(value):
            raise ValueError(message.format(value=value))


def check_accelerator(args: TrainingArguments) -> None:
    """Check how batches are shared out among processes, once transformers has read ``accelerator_config``.

    Raises:
        ValueError: batches are to be shared out among processes in a way that this version does not know.
    """
    given: Any = args.accelerator_config
    if given.split_batches:
        raise ValueError("`accelerator_config`: `split_batches` must be False; each process reads its own batches.")
    if given.dispatch_batches:
        raise ValueError(
            "`accelerator_config`: `dispatch_batches` must be False: batches hold text, which cannot be sent to other "
            "processes as tensors."
        )
    if not given.even_batches:
        raise ValueError(
            "`accelerator_config`: `even_batches` must be True: all processes make equally many passes. Rows that fill "
            "up a last batch are not trained on."
        )


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


def check_unsupported(args: Any) -> None:
    """Check arguments of transformers that are not supported, once it has read them.

    Raises:
        ValueError: an argument of transformers asks for something that this version does not do.
    """
    if args.remove_unused_columns:
        raise ValueError(
            "`remove_unused_columns` must be False: the prompt itself and the columns that reward functions "
            "receive are no arguments of the model's forward."
        )
    if args.flex_attention and args.device.type != "cuda":
        raise ValueError(
            f"`flex_attention=True` needs a GPU with CUDA or ROCm, and this run computes on {args.device.type!r}. "
            "Leave it unset."
        )
    unfit = unfit_for_flex_attention(args)
    if args.flex_attention and unfit:
        raise ValueError(f"`flex_attention=True` cannot be used: {unfit}. Leave one of the two unset.")
    if args.flex_attention and not args.share_prompts:
        raise ValueError("`flex_attention=True` reads rows that share prompts, and `share_prompts` is off.")
    if args.auto_find_batch_size:
        raise ValueError(
            "`auto_find_batch_size` must be False: a micro-batch that runs out of memory is split by the trainer "
            "itself, without changing the gradient."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            "`label_smoothing_factor` smooths next tokens, which the loss does not predict; leave it 0. Preferences "
            "are smoothed by `label_smoothing`."
        )


def check_generation_kwargs(given: Mapping[str, Any] | str | None) -> None:
    """Check the names of `generation_kwargs`.

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
