"""A trainer in a process of its own that makes one optimizer step at a time, when told to.

The parent writes a word a line ("time", "memory", "rate", "stop") and reads a JSON object a line. Between two steps the
trainer stands still inside a callback, so two workers that are asked in turn never compute at the same time, and both
meet the same ups and downs of the machine. What a trainer holds goes with its process, on a GPU too.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from trainers import Job

LINES_OF_LOG_SHOWN = 15


class WorkerFailed(RuntimeError):
    """A worker process ended early; the message holds the last lines it wrote."""


class Worker:
    """The parent's side.

    Args:
        job: what to train. The process starts at once; ``ready`` waits for it.
        limit: seconds after which the process is killed, whatever it does; ``None``: never.
    """

    def __init__(self, job: Job, limit: float | None = None) -> None:
        self.job = job
        self._limit = limit
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = os.environ | {
            "OMP_NUM_THREADS": str(job.threads),
            "MKL_NUM_THREADS": str(job.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        if job.device == "cuda":  # with several cards in sight, Trainer would share its batches among them
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._timer = threading.Timer(limit or 0, self._kill_late)
        self._late = False
        if limit is not None:
            self._timer.start()

    def ready(self) -> dict[str, Any]:
        """``models_mib``: memory the process holds with its models loaded, before any step. ``weights``: checksums of
        the models. ``used_mib``: memory of the card in use before the models were made, by all processes.
        """
        return self._read()

    def _kill_late(self) -> None:
        self._late = True
        self._process.kill()

    def ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(word, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failure() from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> WorkerFailed:
        self._process.wait()
        self._log.seek(0)
        last = "".join(self._log.readlines()[-LINES_OF_LOG_SHOWN:])
        how = f"took more than {self._limit:.0f} s" if self._late else "stopped"
        return WorkerFailed(f"the worker for {self.job.side}, workload {self.job.workload}, {how}:\n{last}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._timer.cancel()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # at which a worker that waits for a word ends
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


# --- the worker's side -----------------------------------------------------------------------------------------------


def _own_channel() -> TextIO:
    """What stdout was; whatever prints from now on prints to stderr."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def main(job_text: str) -> None:
    channel = _own_channel()
    import gc

    from measure import device_used_mib, matrix_rate
    from trainers import Job, Probe, build
    from transformers import TrainerCallback

    job = Job(**json.loads(job_text))
    used_mib = device_used_mib(job.device)
    probe = Probe(job.device)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=channel, flush=True)

    def wait_for_step() -> None:
        for line in sys.stdin:
            word = line.strip()
            if word == "rate":
                say({"gflops": matrix_rate(job.device, job.dtype)})
                continue
            gc.collect()
            probe.start(memory=word == "memory")
            return
        raise SystemExit  # the parent has gone

    class StepByStep(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            probe.time_optimizer(trainer)
            say({"models_mib": probe.meter.held(), "weights": probe.weights, "used_mib": used_mib})
            wait_for_step()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            say(probe.stop())
            wait_for_step()

    with tempfile.TemporaryDirectory() as folder:
        trainer = build(job, folder, probe)
        trainer.add_callback(StepByStep())
        trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
