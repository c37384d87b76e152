"""Fields of `transformers.TrainingArguments` that mean nothing here, or would break what a run promises: they are
refused, and not ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from online_dpo.config.trainer_config import OnlineDPOConfig

FUSED_OPTIMIZERS = ("lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise")
FUSED_OPTIMIZERS += ("galore_adafactor_layerwise", "apollo_adamw_layerwise")
LENGTH_STRATEGIES = ("group_by_length", "batch_rebalance")


def check_refused(args: OnlineDPOConfig) -> None:
    """Before transformers reads the fields.

    Raises:
        ValueError: one of them is set; the message says why not, and what there is instead.
    """
    optimizer: Any = getattr(args.optim, "value", args.optim)
    lengths = args.train_sampling_strategy in LENGTH_STRATEGIES
    refused: list[tuple[bool, str]] = [
        (
            args.neftune_noise_alpha is not None,
            "`neftune_noise_alpha` adds noise by the length of a row, but rows here hold several completions; and "
            "policy and reference would be compared with and without noise. Leave it unset.",
        ),
        (
            args.use_liger_kernel is True,
            "`use_liger_kernel` replaces the policy's `forward` when training begins, where the trainer has its own; "
            "logits exist for a few hundred tokens at a time without it. Leave it off.",
        ),
        (
            optimizer in FUSED_OPTIMIZERS,
            f"`optim={optimizer!r}` updates weights during the backward pass, so that a step that is not finite could "
            "not be skipped, and passes would not add up. Use another, such as `adamw_torch` or `galore_adamw`.",
        ),
        (
            lengths,
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` goes by the length of texts, which is unknown "
            "before they are sampled; rows are packed by tokens anyway. Use `random` or `sequential`.",
        ),
        (
            args.bf16_full_eval or args.fp16_full_eval,
            "`bf16_full_eval` and `fp16_full_eval` cast the policy itself. Leave them off: with `bf16` or `fp16` "
            "evaluation computes in that type.",
        ),
        (
            not args.average_tokens_across_devices,
            "`average_tokens_across_devices` must be True: the loss is a mean over the pairs of all processes.",
        ),
        (
            args.label_names is not None,
            "`label_names` has nothing to name: there are no labels. `compute_metrics` receives the reference's scores "
            "as `label_ids`.",
        ),
        (
            args.parallelism_config is not None,
            "`parallelism_config` is not in this version. Use several processes without it (torchrun).",
        ),
    ]
    for is_set, message in refused:
        if is_set:
            raise ValueError(message)


def check_accelerator(args: OnlineDPOConfig) -> None:
    """Once transformers has read ``accelerator_config``.

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
