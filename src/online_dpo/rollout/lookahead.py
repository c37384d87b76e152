"""Steps whose rollouts or scores are made while an earlier step is trained on."""

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
    """The prompts of a step: ``num_prompts`` in ``num_batches`` batches, of which ``prompts`` are usable."""

    prompts: list[Prompt]
    num_prompts: int
    num_batches: int


Fetch = Callable[[int], Fetched | None]
Begin = Callable[[int, list[Prompt]], Callable[[], Feedback]]


class Lookahead:
    """Keeps up to ``depth`` steps begun beyond the one that is trained on; with 0, none, and no thread.

    What was begun is part of a checkpoint: a resumed run trains on the same completions as the uninterrupted one.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._begun: deque[tuple[int, Fetched, Future[Feedback]]] = deque()
        self._taken: tuple[int, Fetched, Future[Feedback]] | None = None
        self._source: object = None
        self._saved: dict[int, tuple[list[Prompt], Feedback]] = {}
        self._threads = ThreadPoolExecutor(depth, thread_name_prefix="lookahead") if depth else None

    def take(self, step: int, source: object, fetch: Fetch, begin: Begin) -> tuple[Fetched, Feedback, float]:
        """The prompts of this step, what became of them, and the seconds that this had to be waited for.

        The next steps are begun first.

        Args:
            source: where prompts come from; what was begun with those of another source is forgotten.
            fetch: the prompts of a step; ``None`` for a later step that there will not be.
            begin: does what has to be done at once, and returns what may be done beside training.
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
        """Until nothing is under way. What has failed is told by `take`, at the same time on every rank."""
        wait([future for _, _, future in self._begun])

    def save(self, folder: Path, rank: int, step: int) -> None:
        """Write down what has been begun of ``step`` and later ones, once it is complete; what failed is left out, and
        will be made anew. A step that has been taken and not ended is among it, if steps are begun ahead at all.
        """
        taken = [] if self._taken is None or not self.depth else [self._taken]
        kept = {
            begun: (fetched.prompts, future.result())
            for begun, fetched, future in (*taken, *self._begun)
            if begun >= step and future.exception() is None
        }
        if kept:
            torch.save(kept, folder / FILE.format(rank=rank))

    def restore(self, folder: Path, rank: int) -> None:
        """Use what `save` wrote for the same prompts, in place of beginning those steps anew."""
        path = folder / FILE.format(rank=rank)
        if path.is_file():
            self._saved = torch.load(path, weights_only=False)  # our own objects, as the trainer's other states

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _feedback(self, step: int, prompts: list[Prompt], begin: Begin) -> Future[Feedback]:
        saved_prompts, saved = self._saved.pop(step, (None, None))
        future: Future[Feedback] = Future()
        if saved is not None and saved_prompts is not None and _names(saved_prompts) == _names(prompts):
            future.set_result(saved)
            return future
        rest = begin(step, prompts)
        if self._threads is not None:
            return self._threads.submit(torch.no_grad()(rest))
        future.set_result(rest())
        return future


def _names(prompts: list[Prompt]) -> list[tuple[int, tuple[int, ...]]]:
    return [(prompt.row, prompt.token_ids) for prompt in prompts]
