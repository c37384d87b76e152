"""Lookahead: rollouts and scores of later steps are computed while an earlier step is trained."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from online_dpo.checkpoints.codec import read_json, write_json
from online_dpo.errors import CheckpointError
from online_dpo.rollout.begun import BegunStep, Fetched, Samples, SavedStep, saved_step
from online_dpo.types import Feedback, Prompt

FILE = "lookahead-{rank}.json"

Fetch = Callable[[int], Fetched | None]
Answer = Callable[[], Feedback]
Begin = Callable[[int, list[Prompt], Samples | None], tuple[Samples, Answer]]


@dataclass(frozen=True)
class SavedSteps:
    """The content of the file: the steps that had been begun."""

    steps: list[SavedStep]


class Lookahead:
    """A queue of steps whose feedback is computed in threads: up to ``depth`` steps ahead of the one that is trained.
    With ``depth`` 0 there is no thread, and no step is begun early.

    What was sampled for these steps is saved in checkpoints, with their feedback if it is there, so that a resumed run
    trains on the same completions as an uninterrupted one. Completions whose assessment failed are assessed again.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._begun: deque[BegunStep] = deque()
        self._taken: BegunStep | None = None
        self._source: object = None
        self._saved: dict[int, SavedStep] = {}
        self._threads = ThreadPoolExecutor(depth, thread_name_prefix="lookahead") if depth else None

    def take(self, step: int, source: object, fetch: Fetch, begin: Begin) -> tuple[Fetched, Feedback, float]:
        """Begins the next steps, then waits for this one; returns its prompts, its feedback, and the seconds waited.

        Args:
            source: identifies where prompts come from; steps that were begun with another source are discarded.
            fetch: returns the prompts of a step; ``None`` if the run ends before it.
            begin: does the part of a step that must be done at once, in this thread, unless it is given what was
                sampled before; returns what is sampled, and a function for the part that may run in another thread
                while the model is trained.
        """
        if source is not self._source:
            self._source, self._taken = source, None
            self._begun.clear()
        while len(self._begun) <= self.depth:
            later = step + len(self._begun)
            fetched = fetch(later)
            if fetched is None:
                break
            self._begun.append(self._begin(later, fetched, begin))
        self._taken = first = self._begun.popleft()
        assert first.step == step
        since = time.perf_counter()
        return first.fetched, first.feedback.result(), time.perf_counter() - since

    def wait(self) -> None:
        """Waits until no step is being computed. Errors are raised later by `take`, at the same time on every rank."""
        wait([begun.feedback for begun in self._begun])

    def files(self, rank: int) -> Sequence[str]:
        """Returns the name of the file that `save` writes, if there is a ``depth``."""
        return [FILE.format(rank=rank)] if self.depth else []

    def save(self, folder: Path, rank: int, step: int) -> None:
        """Waits for ``step`` and later ones that were begun, and writes them to the checkpoint's folder.

        Of steps that failed, what was sampled is written. A step that was taken and whose training has not ended is
        saved too.
        """
        if not self.depth:
            return
        begun = [*([] if self._taken is None else [self._taken]), *self._begun]
        kept = [saved_step(one) for one in begun if one.step >= step]
        write_json(folder / FILE.format(rank=rank), SavedSteps([one for one in kept if one.rounds]))

    def restore(self, folder: Path, rank: int) -> None:
        """Reads what `save` wrote. `take` then goes on from it instead of beginning those steps again.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        self._saved = {}
        if not self.depth:
            return
        saved = read_json(folder / FILE.format(rank=rank), SavedSteps)
        self._saved = {one.step: one for one in saved.steps}

    @property
    def restored(self) -> set[int]:
        """The steps that a checkpoint holds and that have not been taken up yet."""
        return set(self._saved)

    def keep_restored(self, steps: Collection[int]) -> None:
        """Forgets what the checkpoint holds of other steps than these."""
        self._saved = {step: one for step, one in self._saved.items() if step in steps}

    def close(self) -> None:
        """Stops the threads; steps that have not started are cancelled."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _begin(self, step: int, fetched: Fetched, begin: Begin) -> BegunStep:
        """Begins a step, or goes on from what a checkpoint holds of it."""
        samples, feedback = self._restored(step, fetched.prompts)
        future: Future[Feedback] = Future()
        if samples is not None and feedback is not None:
            future.set_result(feedback)
            return BegunStep(step, fetched, samples, future)
        samples, answer = begin(step, fetched.prompts, samples)
        if self._threads is not None:
            return BegunStep(step, fetched, samples, self._threads.submit(torch.no_grad()(answer)))
        future.set_result(answer())
        return BegunStep(step, fetched, samples, future)

    def _restored(self, step: int, prompts: list[Prompt]) -> tuple[Samples | None, Feedback | None]:
        saved = self._saved.pop(step, None)
        if saved is None:
            return None, None
        if not saved.is_of(prompts):
            raise CheckpointError(
                f"Step {step} has other prompts now than those that the checkpoint holds completions of: the data or "
                "its order have changed. Put them back, or sample anew with `resume_anyway: true`."
            )
        return saved.restored(prompts)
