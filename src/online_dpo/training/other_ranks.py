"""What a run does about its other processes: it tells them of itself, and may save a checkpoint in place of all.

Without sharding every rank has the same weights and the same state of the optimizer. What only its own rank has
is the state of its random generators, and its part of the metrics since the last log. Each rank writes these files into
the store of the process group at the end of a step. So one that survives can write a checkpoint that is whole.
"""

from __future__ import annotations

import base64
import io
import json
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online_dpo.distributed.rank_watch import RankWatch
from online_dpo.distributed.standing_in import only_process
from online_dpo.errors import RankLostError
from online_dpo.training.run_state import Stateful

Files = dict[str, bytes]
"""What a rank saves for itself: the bytes of files by their names."""

RNG_FILE = "rng_state_{rank}.pth"
"""The name that `transformers.Trainer` gives it."""

SAVED = "saved"
POLL_SECONDS = 0.2


class OtherRanks(TrainerCallback):
    """The other processes of a run, of which some may be lost.

    Args:
        watch: the watch over them; ``None`` in a single process.
        own_part: what each rank saves for itself beside the random state.
        keeps_parts: whether each rank keeps what no other has: its part of sharded weights or of the optimizer's state,
            or feedback of steps begun ahead (``max_staleness``). It is lost with the rank, and no other can save.
    """

    def __init__(self, watch: RankWatch | None, own_part: Stateful, keeps_parts: bool) -> None:
        self._watch, self._own_part, self.keeps_parts = watch, own_part, keeps_parts
        self._random_state = b""
        self._files: list[Files] | None = None

    @property
    def stands_in(self) -> bool:
        """Whether this process saves a checkpoint in place of all."""
        return self._files is not None

    def guarded(self) -> AbstractContextManager[None]:
        """Inside, the process ends if it waits for what does not come; see `RankWatch.guarded`."""
        return nullcontext() if self._watch is None else self._watch.guarded()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the other ranks that the step is done, and what a checkpoint of it holds of this rank."""
        if self._watch is not None:
            self._watch.step = state.global_step
            self._random_state = _rng_state()
            self._tell_files(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell it again: what has been logged is no part of a checkpoint any more."""
        if self._watch is not None and self._watch.step == state.global_step > 0:
            self._tell_files(state.global_step)

    def _tell_files(self, step: int) -> None:
        """Write the files for the other ranks. Where the disk is full, none of them can save in place of this one."""
        with suppress(OSError):
            self._write_for_others(step)

    def _write_for_others(self, step: int) -> None:
        assert self._watch is not None
        rank = self._watch.rank
        with TemporaryDirectory(prefix="online-dpo-") as folder:
            (Path(folder) / RNG_FILE.format(rank=rank)).write_bytes(self._random_state)
            self._own_part.save(Path(folder), rank)
            files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in Path(folder).iterdir()}
        self._watch.put(_name(rank, step), json.dumps({"step": step, "files": files}).encode())

    @contextmanager
    def saving_after(self, error: BaseException, together: bool, step: int) -> Iterator[bool]:
        """Inside, this process may save a checkpoint of ``step`` if the value is true.

        Args:
            error: what has ended the run.
            together: whether it has ended it on all ranks, so that they can save as usual.
        """
        if self._watch is None or together:
            yield True
        elif not isinstance(error, RankLostError):
            self._watch.tell_failure(error)
            yield False
        elif self._is_first_left(error.ranks) and (files := self._files_after(step)) is not None:
            self._files = files
            try:
                with only_process():
                    yield True
            finally:
                self._files = None
                self._watch.put(SAVED, b"")
                self._watch.tell_failure(error)
        else:
            self._await_saved(error.ranks)
            yield False
            self._watch.tell_failure(error)

    def write_files(self, folder: Path) -> None:
        """Write the files of all ranks if this process saves for all."""
        for files in self._files or ():
            for name, data in files.items():
                (folder / name).write_bytes(data)

    def _is_first_left(self, lost: tuple[int, ...]) -> bool:
        assert self._watch is not None
        return bool(lost) and self._watch.rank == min(set(range(self._watch.size)) - set(lost))

    def _files_after(self, step: int) -> list[Files] | None:
        """The files of all ranks at the end of a step; ``None`` if those of one are not known, or are not all."""
        assert self._watch is not None
        if self.keeps_parts:
            return None
        notes = [json.loads(self._watch.get(_name(rank, step)) or b"{}") for rank in range(self._watch.size)]
        if any(note.get("step") != step for note in notes):
            return None
        return [{name: base64.b64decode(data) for name, data in note["files"].items()} for note in notes]

    def _await_saved(self, lost: tuple[int, ...]) -> None:
        """Wait while another rank saves: torchrun ends all processes soon after the first one has ended."""
        assert self._watch is not None
        left = set(range(self._watch.size)) - set(lost)
        saver, until = min(left, default=self._watch.rank), time.monotonic() + self._watch.limit
        if self.keeps_parts or saver == self._watch.rank:
            return
        while (
            time.monotonic() < until
            and not self._watch.has_lost_store
            and saver not in self._watch.missing()
            and self._watch.get(SAVED) is None
        ):
            time.sleep(POLL_SECONDS)


def _name(rank: int, step: int) -> str:
    """The key of a rank's files. Only the last two steps are kept: a rank is at most one step ahead of another."""
    return f"files-{rank}-{step % 2}"


def _rng_state() -> bytes:
    """The state of this process's generators, as `transformers.Trainer` saves it."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state_all()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
