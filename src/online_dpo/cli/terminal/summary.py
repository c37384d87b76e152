"""What a run is once its models are loaded, what came of it, and where that is: a few lines each."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from online_dpo.cli.terminal.header import line
from online_dpo.training.arguments import named_datasets
from online_dpo.training.display.figures import count, duration, evaluation_prefix, number

if TYPE_CHECKING:
    from online_dpo.training.trainer import OnlineDPOTrainer

BEST_BY = ("gold_score", "gold_win_rate", "win_rate", "objective/scores")
"""What says which evaluation is the best where the configuration does not: the first that evaluations have."""

FROM_TO = {
    "reward": "objective/scores",
    "KL": "objective/kl",
    "tokens": "completions/mean_length",
}

SHARE = 10
"""The first and the last tenth of the logs make the two numbers of a figure: single logs are too noisy."""


def describe_trainer(trainer: OnlineDPOTrainer) -> Iterator[str]:
    """What the loaded models and prompts are, one line each."""
    args, policy = trainer.args, trainer.policy
    sizes = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    everything, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    share = "all trained" if trained == everything else f"{count(trained)} ({trained / everything:.2%}) trained"
    dtypes = {str(p.dtype).removeprefix("torch."): None for p in policy.parameters()}
    mixed = f", computed in {args.mixed_precision}" if args.mixed_precision != "no" else ""
    yield line("parameters", f"{count(everything)}, {share}; {' and '.join(dtypes)}{mixed} on {args.device}")
    if isinstance(trainer.train_dataset, Dataset):
        total, steps = len(trainer.train_dataset), args.max_steps
        a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        epochs = steps * a_step / total if steps > 0 else args.num_train_epochs
        yield line("prompts", f"{count(total)}{_cut(trainer.train_dataset)}, gone through {epochs:.3g} times")
    else:
        yield line("prompts", "a stream")
    for name, dataset in named_datasets(trainer.eval_dataset).items():
        if isinstance(dataset, Dataset):
            rest = name.removeprefix("eval_dataset").strip("['\"]")
            yield line("evaluation", f"{count(len(dataset))}{_cut(dataset)}{rest and f' of {rest}'}")
    yield line("reference", trainer.reference.description)


def _cut(dataset: Dataset) -> str:
    cut = sum(dataset["prompt_cut"][:])
    return f", {count(cut)} of them cut" if cut else ""


def summary_of_figures(args: TrainingArguments, state: TrainerState, first_step: int, seconds: float) -> Iterator[str]:
    """Steps and time of this process; reward and KL from the run's beginning to its end; its best evaluation."""
    steps = state.global_step - first_step
    if steps <= 0:
        return
    before = f", after the {count(first_step)} of before" if first_step else ""
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
    """The means of the first and of the last ``part`` values that there are; ``None`` without values.

    >>> from_to([1.0, 1.5, None, 3.0], part=1)
    '1 to 3'
    """
    found = [value for value in values if value is not None]
    return f"{number(statistics.fmean(found[:part]))} to {number(statistics.fmean(found[-part:]))}" if found else None


def best_evaluation(args: TrainingArguments, log_history: Sequence[Mapping[str, Any]]) -> str | None:
    """``at step 40: eval_win_rate 0.81, the highest of 5``; ``None`` where nothing was evaluated.

    The best by ``metric_for_best_model`` if that is set, else the highest of the first of `BEST_BY`. Of several
    datasets, each evaluation counts for itself.
    """
    evaluations = [(evaluation_prefix(log), log) for log in log_history if evaluation_prefix(log)]
    named, higher = args.metric_for_best_model, args.greater_is_better is not False
    wanted = BEST_BY if named is None else (named.removeprefix("eval_"),)
    for name in wanted:
        having = [(log[prefix + name], log["step"], prefix) for prefix, log in evaluations if prefix + name in log]
        if having:
            highest = higher or named is None
            value, step, prefix = (max if highest else min)(having, key=lambda one: one[0])
            rank = f", the {'highest' if highest else 'lowest'} of {len(having)}" if len(having) > 1 else ""
            return f"at step {step}: {prefix}{name} {number(value)}{rank}"
    return None


def places(output_dir: str) -> Iterator[str]:
    """Where the final model, the log and the checkpoints of a finished run are."""
    folder = Path(output_dir)
    yield f"Model saved in {folder}"
    yield f"  log of every metric: {folder / TRAINER_STATE_NAME}"
    steps = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    if steps:
        names = ", ".join(map(str, steps)) if len(steps) <= 5 else f"{steps[0]} to {steps[-1]}, {len(steps)} of them"
        yield f"  checkpoints: {folder / PREFIX_CHECKPOINT_DIR}-STEP, of {_plural('step', len(steps))} {names}"


def _plural(word: str, amount: float) -> str:
    return word if amount == 1 else f"{word}s"
