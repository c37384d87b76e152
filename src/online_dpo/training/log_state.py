"""What has been collected since the last log, as a part of checkpoints: a resumed run logs every step once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online_dpo.checkpoints.codec import read_json, write_json
from online_dpo.distributed.collectives import world_size
from online_dpo.stats.catalogue import Metric, describe
from online_dpo.stats.moments import Moments
from online_dpo.training.display.figures import in_order
from online_dpo.training.metric_store import MetricStore, Snapshot
from online_dpo.training.metrics.machine import Machine

OF_TRAINER = "Of transformers.Trainer"
describe(
    OF_TRAINER,
    Metric("step", "steps", "optimizer steps done", "Where the log is from."),
    Metric("epoch", "epochs", "passes over the training prompts done", "The same."),
    Metric("learning_rate", "1", "learning rate of the last step", "The schedule, and what the guard makes of it."),
    Metric("grad_norm", "1", "norm of the last step's gradient before clipping", "Spikes: lower the learning rate."),
    Metric(
        "num_input_tokens_seen",
        "tokens",
        "tokens read by the policy in training",
        "The same.",
        "with `include_num_input_tokens_seen`",
    ),
    Metric(
        "train_tokens_per_second",
        "tokens/s",
        "tokens read by the policy per second of the whole run",
        "The same.",
        "with `include_num_input_tokens_seen`",
    ),
    Metric("train_loss", "nats", "mean of the steps' losses", "In the last log of a run."),
    Metric("train_runtime", "s", "seconds of the whole run", "The same."),
    Metric("train_samples_per_second", "1/s", "prompts per second of the whole run", "The same."),
    Metric("train_steps_per_second", "1/s", "steps per second of the whole run", "The same."),
    Metric("total_flos", "operations", "transformers' estimate for the whole run", "See `perf/teraflops` instead."),
    Metric("eval_runtime", "s", "seconds of an evaluation", "What it costs."),
    Metric("eval_samples_per_second", "1/s", "held-out prompts per second", "The same."),
    Metric("eval_steps_per_second", "1/s", "batches of held-out prompts per second", "The same."),
)


@dataclass(frozen=True)
class SinceLastLog:
    """What a checkpoint holds: what this rank has collected since the last log, and the seconds since then."""

    sums: Mapping[str, float]
    counts: Mapping[str, float]
    totals: Mapping[str, float]
    largest: Mapping[str, float]
    seconds: float
    moments: Mapping[str, tuple[float, ...]] = field(
        default_factory=dict
    )  # in checkpoints of version 0.1 there is none


class LogState(TrainerCallback):
    """Keeps the metrics of the steps that are done apart from those of a step that may fail.

    ``last_log`` is the time of the last log.

    Args:
        metrics: what is collected.
        device: that this process trains on; its memory is in the log as well.
    """

    FILE = "metrics-{rank}.json"

    def __init__(self, metrics: MetricStore, device: torch.device) -> None:
        self._metrics, self._stopped = metrics, False
        self.machine = Machine(metrics, device)
        self.begin_run()

    def begin_run(self) -> None:
        """Start anew for a new run."""
        self._metrics.restore(Snapshot({}, {}, {}, {}))
        self._before_step: Snapshot | None = None
        self.last_log = time.perf_counter()

    def restart_clock(self) -> float:
        """Return the seconds since the last log; they are counted from now on."""
        before, self.last_log = self.last_log, time.perf_counter()
        return self.last_log - before

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """Inside, no time passes for the log; one inside another changes nothing."""
        if self._stopped:
            yield
            return
        start, self._stopped = time.perf_counter(), True
        try:
            yield
        finally:
            self.last_log += time.perf_counter() - start
            self._stopped = False

    def step_log(self, logs: Mapping[str, float], skipped: int) -> dict[str, float]:
        """Return the log of a training step with the metrics collected since the last one; a collective operation.

        The parent's loss is a mean over steps, in which one without pairs counts 0; the one collected is over pairs.
        """
        elapsed = self.restart_clock()
        self.machine.record()
        own = self.machine.figures(self._metrics.drain(), elapsed)
        others = {name: value for name, value in logs.items() if name != "loss"}
        return in_order({**others, **own, "guard/skipped_steps": float(skipped)})

    def begin_step(self) -> None:
        """Remember what belongs to the steps before."""
        self._before_step = self._metrics.snapshot()

    def is_in_step(self) -> bool:
        """Whether a step has been begun and is not done."""
        return self._before_step is not None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Count the step: it is done."""
        self._before_step = None

    def files(self, rank: int) -> Sequence[str]:
        """Return no name: a checkpoint of an earlier version, without the file, loses part of a log only."""
        return []

    def save(self, folder: Path, rank: int) -> None:
        """Save what was collected in the steps that are done, on every rank."""
        now = self._before_step or self._metrics.snapshot()
        sums, counts, totals, largest = (
            {name: float(value) for name, value in part.items()}
            for part in (now.sums, now.counts, now.totals, now.largest)
        )
        moments = {name: value.numbers() for name, value in now.moments.items()}
        since = SinceLastLog(sums, counts, totals, largest, time.perf_counter() - self.last_log, moments)
        write_json(folder / self.FILE.format(rank=rank), since)

    def restore(self, folder: Path, rank: int) -> None:
        """Go on from what `save` wrote.

        Raises:
            CheckpointError: the file is damaged.
        """
        own, written = [folder / self.FILE.format(rank=rank)], sorted(folder.glob(self.FILE.format(rank="*")))
        if len(written) != world_size():  # other processes wrote it: the first one takes up what all had collected
            own = written if rank == 0 else []
        saved = [read_json(path, SinceLastLog) for path in own if path.is_file()]
        if saved:
            largest = {n: max(o.largest[n] for o in saved if n in o.largest) for n in _names(saved, "largest")}
            sums, counts, totals = (_added(saved, part) for part in ("sums", "counts", "totals"))
            tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in largest.items()}
            moments = {n: _merged(saved, n) for n in _names(saved, "moments")}
            self._metrics.restore(Snapshot(sums, counts, totals, tensors, moments))
            self.last_log = time.perf_counter() - max(one.seconds for one in saved)


def _names(saved: Sequence[SinceLastLog], part: str) -> list[str]:
    return list(dict.fromkeys(name for one in saved for name in getattr(one, part)))


def _added(saved: Sequence[SinceLastLog], part: str) -> dict[str, float]:
    return {name: sum(getattr(one, part).get(name, 0.0) for one in saved) for name in _names(saved, part)}


def _merged(saved: Sequence[SinceLastLog], name: str) -> Moments:
    return sum((Moments(*one.moments[name]) for one in saved if name in one.moments), Moments())
