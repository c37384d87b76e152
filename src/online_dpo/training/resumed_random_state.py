"""The random state of a checkpoint inside an epoch, restored at the right moment."""

from __future__ import annotations

from collections.abc import Callable


class ResumedRandomState:
    """Restores it after the data loader's first draw, which an uninterrupted run has made before, and before those of
    reward functions. `transformers.Trainer` restores it after both.

    Args:
        load: restores the random state of a checkpoint's folder.
    """

    def __init__(self, load: Callable[[str | None], None]) -> None:
        self._load = load
        self.begin_epoch(None)

    def begin_epoch(self, checkpoint: str | None) -> None:
        """Begin an epoch, inside which this checkpoint was saved if there is one."""
        self._checkpoint, self._done = checkpoint, False

    def restore(self) -> None:
        """Restore the random state, once: the prompts of the first step are read."""
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            self._load(checkpoint)
            self._done = True

    def load(self, checkpoint: str | None) -> None:
        """Restore a random state, unless `restore` has done it."""
        if not self._done:
            self._load(checkpoint)
        self._done = False
