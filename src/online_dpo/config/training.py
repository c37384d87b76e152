"""Fields of the configuration that say how the policy is loaded and trained, and what stops a run.

Some are fields of :class:`transformers.TrainingArguments` with another default or another meaning here.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from online_dpo.config.checking import check_numbers, warn_ignored
from online_dpo.config.field_specs import documented


@documented
@dataclass
class TrainingFields:
    """Part of :class:`online_dpo.OnlineDPOConfig`."""

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

    flex_attention: bool | None = None
    """Read rows that share prompts through FlexAttention, which skips what the attention mask hides, with as many
    prompts in a row as `max_tokens_per_pass` allows. When not set: on CUDA, for every model that can (no soft cap or
    dropout in attention, loaded with SDPA, neither `torch_compile` nor `full_determinism`), if a check of its values
    and gradients at the start agrees; other models use SDPA, and the log says why. True: an error where it cannot be
    used. Its speed has not been measured yet.
    """

    max_tokens_per_pass: int | None = None
    """Most tokens in one forward and backward pass, each prompt counted once and padding not at all. A micro-batch with
    more is computed in several passes, with the same gradient. When not set: 1024 on a CPU, where more are no faster;
    on a GPU as many as its free memory is estimated to hold, up to 16384.
    """

    remove_unused_columns: bool = False
    """Has to stay off: reward functions receive the dataset's other columns."""

    # --- guards -----------------------------------------------------------------------------------------------------

    max_skipped_steps: int = 10
    """A step whose loss or gradient is not finite is skipped; after this many in a row the run saves a checkpoint and
    stops.
    """

    stop_timeout: float = 20.0
    """Seconds that the running step has to end after SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU, which stop a run
    with a checkpoint. After them the step is dropped, and the checkpoint is of the steps before. Choose it so that the
    checkpoint can still be written before the scheduler kills the process: Kubernetes waits 30 seconds. Several
    processes always end their step.
    """

    skipped_step_lr_factor: float = 1.0
    """After a skipped step the learning rate is multiplied by this, in (0, 1]; 1 is off. Several skipped steps
    multiply. The schedule goes on as it would have; `guard/lr_factor` and `learning_rate` in the log say what was used.
    """

    skipped_step_lr_recovery: int = 100
    """With `skipped_step_lr_factor`: trained steps after which one skipped step is made up for. The learning rate grows
    by the same factor with each of them.
    """

    max_idle_steps: int | None = 100
    """After this many steps in a row that train nothing (no pair, not finite, a learning rate of 0), the run saves a
    checkpoint and stops, with the reasons counted. When not set (`null`), it goes on. Raise it where pairs are rare.
    """

    # --- checkpoints ------------------------------------------------------------------------------------------------

    resume_anyway: bool = False
    """Resume from a checkpoint of a run that computed with something else: other options, data, models, scorers or
    number of processes. What differs is told in a warning; off: in an error, before anything is trained.
    """

    overwrite_output_dir: bool = False
    """Start a run in an `output_dir` that holds checkpoints of an earlier one: these are deleted when training begins.
    """

    # --- models -----------------------------------------------------------------------------------------------------

    model_init_kwargs: dict[str, Any] | str | None = None
    """Passed to `AutoModelForCausalLM.from_pretrained` when the policy (or the reference) is given by name, for example
    `{"attn_implementation": "sdpa"}`. Without a `dtype`, trained weights are loaded in fp32 and a base under an adapter
    as it was saved; trained weights in half precision lose most of their updates."""

    trust_remote_code: bool = False
    """Allow models and tokenizers that bring their own Python code."""

    ds3_gather_for_generation: bool = True
    """Gather the weights that ZeRO-3 has sharded before completions are sampled. It must stay on."""


def unfit_for_flex_attention(args: Any) -> str | None:
    """Why a run with these arguments cannot use FlexAttention, whatever its models; ``None`` if it can."""
    if args.torch_compile:
        return "`torch_compile` compiles the whole model"
    if args.full_determinism:
        return "`full_determinism` is on, and its backward pass has not been shown to be deterministic"
    return None


def check_training(args: TrainingFields) -> None:
    """Check passes and guards. Fields that transformers has as well are checked with the rest of its fields.

    Raises:
        ValueError: a number is out of range.
    """
    tokens = args.max_tokens_per_pass
    checks = [
        (tokens is None or tokens >= 1, "max_tokens_per_pass", "at least 1"),
        (args.max_skipped_steps >= 1, "max_skipped_steps", "at least 1"),
        (0 <= args.stop_timeout < threading.TIMEOUT_MAX, "stop_timeout", "a number of seconds, at least 0"),
        (args.max_idle_steps is None or args.max_idle_steps >= 1, "max_idle_steps", "at least 1, or None"),
        (0 < args.skipped_step_lr_factor <= 1, "skipped_step_lr_factor", "in (0, 1]"),
        (args.skipped_step_lr_recovery >= 1, "skipped_step_lr_recovery", "at least 1"),
    ]
    check_numbers(args, checks)
    if args.skipped_step_lr_factor == 1 and args.skipped_step_lr_recovery != TrainingFields.skipped_step_lr_recovery:
        warn_ignored(["skipped_step_lr_recovery"], "without `skipped_step_lr_factor` below 1")
