"""What a tracker shows beside the numbers that transformers sends it: distributions and pairs."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerState, TrainingArguments

from online_dpo.training.samples import Samples

PREFIX = "samples"
"""Beginning of the names under which trackers have distributions and pairs."""


class Tracker(Protocol):
    """One of the trackers of `report_to`, beside transformers' callback that sends it the metrics.

    All but the constructor is called on the first process alone.
    """

    def __init__(self, callback: Any) -> None: ...

    def go_on(self, run: str, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Have the callback go on with an earlier run, before training begins."""
        ...

    def run(self, args: TrainingArguments) -> str | None:
        """Return what names the run, for `go_on` in another process; ``None`` where there is nothing to go on with."""
        ...

    def show(self, samples: Samples) -> None:
        """Send distributions and pairs."""
        ...

    def end(self) -> None:
        """Bring everything to where it is kept, at the end of training."""
        ...

    def fail(self) -> None:
        """Do the same where training has failed, and say so, if transformers would leave a run open."""
        ...
