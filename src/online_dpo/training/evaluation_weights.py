"""The weights that an optimizer evaluates, where it trains others, as a schedule-free one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer


class EvaluationWeights:
    """Puts the weights into the model that are evaluated and saved. With an optimizer that has one set, does nothing.

    ``held`` says whether the model has them now, in place of those that are trained.

    Args:
        optimizer: returns the trainer's optimizer, once there is one.
        is_training: returns whether training goes on.
    """

    def __init__(self, optimizer: Callable[[], Any], is_training: Callable[[], bool]) -> None:
        self._optimizer, self._is_training = optimizer, is_training
        self.held = False

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside, the model has the weights that are evaluated. Afterwards, if training goes on, it has the trained
        ones, from which the next step samples.
        """
        if self.held:
            yield
            return
        self.put(True)
        try:
            yield
        finally:
            self.put(not self._is_training())

    def put(self, evaluated: bool) -> None:
        """Puts the weights that are evaluated, or those that are trained, into the model."""
        optimizer = self._optimizer()
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if callable(getattr(optimizer, "eval", None)):
            optimizer.eval() if evaluated else optimizer.train()
            self.held = evaluated
