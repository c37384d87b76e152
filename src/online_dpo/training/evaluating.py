"""`transformers.Trainer` whose evaluations change nothing of training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PredictionOutput

from online_dpo.distributed.process_state import kept_random_state
from online_dpo.training.log_state import LogState


class EvaluatingTrainer(Trainer):
    """A `Trainer` that evaluates beside training."""

    log_state: LogState
    _beside_training = False

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent's, beside training (see `beside_training`)."""
        with self.beside_training():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As the parent's, beside training (see `beside_training`)."""
        with self.beside_training():
            return super().predict(*args, **kwargs)

    @contextmanager
    def beside_training(self) -> Iterator[None]:
        """Keeps what is done inside from changing training: its time does not count in ``perf/tokens_per_second``, and
        random numbers that are drawn meanwhile, by a reward function too, are drawn again.
        """
        if self._beside_training:  # one of several datasets
            yield
            return
        start, self._beside_training = time.perf_counter(), True
        try:
            with kept_random_state():
                yield
        finally:
            self.log_state.last_log += time.perf_counter() - start
            self._beside_training = False
