"""Ctrl-C during training: the first one saves a checkpoint and stops, the second one stops at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

NOTICE = b"\nStopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.\n"


class InterruptCallback(TrainerCallback):
    """Stops a run at the end of the step in which Ctrl-C was pressed.

    Use it as a context manager around ``trainer.train()``, and pass it to the trainer as a callback. ``stopped`` says
    afterwards whether it ended the run, ``checkpoint`` is the folder that was saved last, if any.
    """

    def __init__(self) -> None:
        self.requested = False
        self.stopped = False
        self.checkpoint: str | None = None
        self._previous: Any = None

    def __enter__(self) -> InterruptCallback:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, NOTICE)  # not print: the signal may have come in the middle of a write to the same stream

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._requested_anywhere(args):
            control.should_save = True
            control.should_training_stop = True
            self.stopped = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.checkpoint = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")

    def _requested_anywhere(self, args: TrainingArguments) -> bool:
        """Whether any rank was interrupted: all have to stop at the same step, or the others wait for it for ever."""
        if args.world_size == 1:
            return self.requested
        requested = torch.tensor(int(self.requested), device=args.device)
        torch.distributed.all_reduce(requested, op=torch.distributed.ReduceOp.MAX)
        return bool(requested.item())
