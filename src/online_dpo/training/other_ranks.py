"""What a run does about its other processes: it tells them of itself, and may save a checkpoint in place of all.

Under data parallelism every rank has the same weights and the same state of the optimizer. What only its own rank has
is the state of its random generators. Each rank writes it into the store of the process group at the end of a step. So
one that survives can write a checkpoint that is whole.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online_dpo.distributed.rank_watch import RankWatch
from online_dpo.distributed.standing_in import only_process
from online_dpo.errors import RankLostError

RNG_FILE = "rng_state_{rank}.pth"
"""The name that `transformers.Trainer` gives it."""

SAVED = "saved"
POLL_SECONDS = 0.2


class OtherRanks(TrainerCallback):
    """The other processes of a run, of which some may be lost.

    Args:
        watch: the watch over them; ``None`` in a single process.
        keeps_feedback: whether each rank keeps feedback of steps begun ahead (``max_staleness``): it is lost with it.
    """

    def __init__(self, watch: RankWatch | None, keeps_feedback: bool) -> None:
        self._watch, self._keeps_feedback = watch, keeps_feedback
        self._states: list[bytes] | None = None

    def guarded(self) -> AbstractContextManager[None]:
        """Inside, the process ends if it waits for what does not come; see `RankWatch.guarded`."""
        return nullcontext() if self._watch is None else self._watch.guarded()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the other ranks that the step is done, and the state of the random generators."""
        if self._watch is not None:
            self._watch.step = state.global_step
            self._watch.put(_name(self._watch.rank, state.global_step), _stamped(state.global_step, _rng_state()))

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
        elif self._is_first_left(error.ranks) and (states := self._states_after(step)) is not None:
            self._states = states
            try:
                with only_process():
                    yield True
            finally:
                self._states = None
                self._watch.put(SAVED, b"")
                self._watch.tell_failure(error)
        else:
            self._await_saved(error.ranks)
            yield False
            self._watch.tell_failure(error)

    def write_rng_states(self, folder: Path) -> bool:
        """Write the states of all ranks if this process saves for all; returns whether it does."""
        for rank, state in enumerate(self._states or ()):
            (folder / RNG_FILE.format(rank=rank)).write_bytes(state)
        return self._states is not None

    def _is_first_left(self, lost: tuple[int, ...]) -> bool:
        assert self._watch is not None
        return bool(lost) and self._watch.rank == min(set(range(self._watch.size)) - set(lost))

    def _states_after(self, step: int) -> list[bytes] | None:
        """The states of all ranks at the end of a step; ``None`` if one is not known, or does not tell all."""
        assert self._watch is not None
        if self._keeps_feedback:
            return None
        states = [self._watch.get(_name(rank, step)) or b"" for rank in range(self._watch.size)]
        stamp = _stamped(step, b"")
        return [state[len(stamp) :] for state in states] if all(state.startswith(stamp) for state in states) else None

    def _await_saved(self, lost: tuple[int, ...]) -> None:
        """Wait while another rank saves: torchrun ends all processes soon after the first one has ended."""
        assert self._watch is not None
        left = set(range(self._watch.size)) - set(lost)
        saver, until = min(left, default=self._watch.rank), time.monotonic() + self._watch.limit
        if self._keeps_feedback or saver == self._watch.rank:
            return
        while time.monotonic() < until and saver not in self._watch.missing() and self._watch.get(SAVED) is None:
            time.sleep(POLL_SECONDS)


def _name(rank: int, step: int) -> str:
    """The key of a rank's state. Only the last two steps are kept: a rank is at most one step ahead of another."""
    return f"random-{rank}-{step % 2}"


def _stamped(step: int, state: bytes) -> bytes:
    return step.to_bytes(8, "big") + state


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
