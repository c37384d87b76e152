"""Lookahead: rollouts and scores of later steps are computed while an earlier step is trained."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from online_dpo.types import Feedback, Prompt

FILE = "lookahead-{rank}.pt"


@dataclass(frozen=True)
class Fetched:
    """The prompts of a step: ``num_prompts`` were read, in ``num_batches`` batches; ``prompts`` are those without an
    error.
    """

    prompts: list[Prompt]
    num_prompts: int
    num_batches: int


Fetch = Callable[[int], Fetched | None]
Begin = Callable[[int, list[Prompt]], Callable[[], Feedback]]


class Lookahead:
    """A queue of steps whose feedback is computed in threads: up to ``depth`` steps ahead of the one that is trained.
    With ``depth`` 0 there is no thread, and no step is begun early.

    The feedback of these steps is saved in checkpoints, so that a resumed run trains on the same completions as an
    uninterrupted one.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._begun: deque[tuple[int, Fetched, Future[Feedback]]] = deque()
        self._taken: tuple[int, Fetched, Future[Feedback]] | None = None
        self._source: object = None
        self._saved: dict[int, tuple[list[Prompt], Feedback]] = {}
        self._threads = ThreadPoolExecutor(depth, thread_name_prefix="lookahead") if depth else None

    def take(self, step: int, source: object, fetch: Fetch, begin: Begin) -> tuple[Fetched, Feedback, float]:
        """Begins the next steps, then waits for this one; returns its prompts, its feedback, and the seconds waited.

        Args:
            source: identifies where prompts come from; steps that were begun with another source are discarded.
            fetch: returns the prompts of a step; ``None`` if the run ends before it.
            begin: does the part of a step that must be done at once, in this thread, and returns a function for the
                part that may run in another thread while the model is trained.
        """
        if source is not self._source:
            self._source = source
            self._begun.clear()
        while len(self._begun) <= self.depth:
            later = step + len(self._begun)
            fetched = fetch(later)
            if fetched is None:
                break
            self._begun.append((later, fetched, self._feedback(later, fetched.prompts, begin)))
        self._taken = first, fetched, future = self._begun.popleft()
        assert first == step
        since = time.perf_counter()
        return fetched, future.result(), time.perf_counter() - since

    def wait(self) -> None:
        """Waits until no step is being computed. Errors are raised later by `take`, at the same time on every rank."""
        wait([future for _, _, future in self._begun])

    def save(self, folder: Path, rank: int, step: int) -> None:
        """Waits for the feedback of ``step`` and later ones that were begun, and writes it to the checkpoint's folder.

        Steps that failed are left out, and computed again after a resume. With a ``depth`` above 0, a step that was
        taken and whose training has not ended is saved too.
        """
        taken = [] if self._taken is None or not self.depth else [self._taken]
        kept = {
            begun: (fetched.prompts, future.result())
            for begun, fetched, future in (*taken, *self._begun)
            if begun >= step and future.exception() is None
        }
        if self.depth:  # also without a step: a file that is not there is missing
            torch.save(kept, folder / FILE.format(rank=rank))

    def restore(self, folder: Path, rank: int) -> None:
        """Reads what `save` wrote. `take` then uses it instead of computing those steps again, if the prompts are
        equal.
        """
        path = folder / FILE.format(rank=rank)
        if path.is_file():
            # Our own dataclasses, so they must be unpickled; as trusted as the trainer's other files.
            self._saved = torch.load(path, weights_only=False)

    def close(self) -> None:
        """Stops the threads; steps that have not started are cancelled."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _feedback(self, step: int, prompts: list[Prompt], begin: Begin) -> Future[Feedback]:
        """The feedback of a step: from a checkpoint, or begun now."""
        saved_prompts, saved = self._saved.pop(step, (None, None))
        future: Future[Feedback] = Future()
        if saved is not None and saved_prompts is not None and _identities(saved_prompts) == _identities(prompts):
            future.set_result(saved)
            return future
        rest = begin(step, prompts)
        if self._threads is not None:
            return self._threads.submit(torch.no_grad()(rest))
        future.set_result(rest())
        return future


def _identities(prompts: list[Prompt]) -> list[tuple[int, tuple[int, ...]]]:
    """What identifies prompts: their rows and token ids."""
    return [(prompt.row, prompt.token_ids) for prompt in prompts]
