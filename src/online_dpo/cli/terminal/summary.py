"""Summaries of a run in a few lines: the loaded models, the results, and where they are saved."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from online_dpo.checkpoints.folders import checkpoints_in, step_of
from online_dpo.cli.terminal.header import line
from online_dpo.modeling.quantization import sizes
from online_dpo.training.arguments import named_datasets
from online_dpo.training.display.figures import count, duration, evaluation_prefix, number

if TYPE_CHECKING:
    from online_dpo.training.trainer import OnlineDPOTrainer

BEST_BY = ("gold_score", "gold_win_rate", "win_rate", "objective/scores")
"""Metrics that decide which evaluation is the best if the configuration does not; the first available one is used."""

FROM_TO = {
    "reward": "objective/scores",
    "KL": "objective/kl",
    "tokens": "completions/mean_length",
}

SHARE = 10
"""A figure's two numbers are means over the first and the last tenth of the logs, since single logs are too noisy."""


def describe_trainer(trainer: OnlineDPOTrainer) -> Iterator[str]:
    """The lines that describe the loaded models and prompts."""
    args, policy = trainer.args, trainer.policy
    parts = [*sizes(policy)]
    total_size, trained = sum(size for size, _, _ in parts), sum(size for size, _, trains in parts if trains)
    share = "all trained" if trained == total_size else f"{count(trained)} ({trained / total_size:.2%}) trained"
    dtypes = {kind: None for _, kind, _ in parts}
    mixed = f", computed in {args.mixed_precision}" if args.mixed_precision != "no" else ""
    yield line("parameters", f"{count(total_size)}, {share}; {' and '.join(dtypes)}{mixed} on {args.device}")
    yield from _prompts(trainer)
    yield line("reference", trainer.reference.description)


def _prompts(trainer: OnlineDPOTrainer) -> Iterator[str]:
    args = trainer.args
    if isinstance(trainer.train_dataset, Dataset):
        total, steps = len(trainer.train_dataset), args.max_steps
        prompts_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        epochs = steps * prompts_per_step / total if steps > 0 else args.num_train_epochs
        yield line("prompts", f"{count(total)}{_cut(trainer.train_dataset)}, gone through {epochs:.3g} times")
    else:
        yield line("prompts", "a stream")
    for name, dataset in named_datasets(trainer.eval_dataset).items():
        if isinstance(dataset, Dataset):
            rest = name.removeprefix("eval_dataset").strip("['\"]")
            yield line("evaluation", f"{count(len(dataset))}{_cut(dataset)}{rest and f' of {rest}'}")


def _cut(dataset: Dataset) -> str:
    cut = sum(dataset["prompt_cut"][:])
    return f", {count(cut)} of them cut" if cut else ""


def summary_of_figures(args: TrainingArguments, state: TrainerState, first_step: int, seconds: float) -> Iterator[str]:
    """The results of a run: steps and time of this process, reward, KL and length at start and end, best evaluation."""
    steps = state.global_step - first_step
    if steps <= 0:
        return
    before = f", after {count(first_step)} earlier {_plural('step', first_step)}" if first_step else ""
    yield f"Trained {count(steps)} {_plural('step', steps)} in {duration(seconds)}{before}."
    logs = [log for log in state.log_history if "prompts" in log]
    part = max(1, len(logs) // SHARE)
    of = "the first log and the last" if part == 1 else f"the means of the first {part} logs and of the last {part}"
    rows = {heading: from_to([log.get(name) for log in logs], part) for heading, name in FROM_TO.items()}
    if len(logs) > 1 and any(rows.values()):
        yield f"From the beginning to the end ({of}):"
        yield from (f"  {heading:<{max(map(len, rows))}}  {row}" for heading, row in rows.items() if row)
    best = best_evaluation(args, state.log_history)
    if best is not None:
        yield f"Best evaluation {best}"


def from_to(values: Sequence[float | None], part: int) -> str | None:
    """The means of the first and of the last ``part`` values, without missing ones; ``None`` without values.

    >>> from_to([1.0, 1.5, None, 3.0], part=1)
    '1 to 3'
    """
    present = [value for value in values if value is not None]
    if not present:
        return None
    return f"{number(statistics.fmean(present[:part]))} to {number(statistics.fmean(present[-part:]))}"


def best_evaluation(args: TrainingArguments, log_history: Sequence[Mapping[str, Any]]) -> str | None:
    """The best evaluation: ``at step 40: eval_win_rate 0.81, the highest of 5``; ``None`` without evaluations.

    It is the best by ``metric_for_best_model`` if that is set, else by the first available metric of `BEST_BY`. With
    several datasets, each evaluation counts separately.
    """
    evaluations = [(evaluation_prefix(log), log) for log in log_history if evaluation_prefix(log)]
    configured, higher = args.metric_for_best_model, args.greater_is_better is not False
    candidates = BEST_BY if configured is None else (configured.removeprefix("eval_"),)
    for name in candidates:
        measured = [(log[prefix + name], log["step"], prefix) for prefix, log in evaluations if prefix + name in log]
        if measured:
            highest = higher or configured is None
            value, step, prefix = (max if highest else min)(measured, key=lambda entry: entry[0])
            rank = f", the {'highest' if highest else 'lowest'} of {len(measured)}" if len(measured) > 1 else ""
            return f"at step {step}: {prefix}{name} {number(value)}{rank}"
    return None


def places(output_dir: str) -> Iterator[str]:
    """The lines that say where a finished run's model, log and checkpoints are."""
    folder = Path(output_dir)
    yield f"Model saved in {folder}"
    yield f"  log of every metric: {folder / TRAINER_STATE_NAME}"
    steps = [step_of(checkpoint) for checkpoint in checkpoints_in(folder)]
    if steps:
        names = ", ".join(map(str, steps)) if len(steps) <= 5 else f"{steps[0]} to {steps[-1]}, {len(steps)} of them"
        yield f"  checkpoints: {folder / PREFIX_CHECKPOINT_DIR}-STEP, of {_plural('step', len(steps))} {names}"


def _plural(word: str, amount: float) -> str:
    return word if amount == 1 else f"{word}s"
