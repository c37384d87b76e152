"""A trainer in a process of its own that makes one optimizer step at a time, when told to.

The parent writes a word a line ("time", "memory", "rate", "stop") and reads a JSON object a line. Between two steps the
trainer stands still inside a callback, so two workers that are asked in turn never compute at the same time, and both
meet the same ups and downs of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
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
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = os.environ | {
            "OMP_NUM_THREADS": str(job.threads),
            "MKL_NUM_THREADS": str(job.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ready(self) -> dict[str, Any]:
        """``models_mib``: memory the process holds with its models loaded, before any step."""
        return self._read()

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
        return WorkerFailed(f"the worker for {self.job.side}, workload {self.job.workload}, stopped:\n{last}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
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

    from measure import matrix_rate
    from trainers import Job, Probe, build
    from transformers import TrainerCallback

    job = Job(**json.loads(job_text))
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
            say({"models_mib": probe.meter.held()})
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
