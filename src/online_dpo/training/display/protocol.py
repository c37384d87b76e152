"""What shows a run while it trains, as the trainer knows it."""

from __future__ import annotations

from transformers import TrainerCallback


class RunDisplay(TrainerCallback):
    """A callback that shows a run. The trainer leaves transformers' own output out where it has one of these."""

    def on_interrupt(self, notice: str) -> bool:
        """Ctrl-C was pressed, and the run stops after this step. Returns whether this display shows ``notice``.

        Called inside a signal handler, which may have come in the middle of anything: it may only set attributes.
        """
        return False

    def close(self) -> None:
        """Give the screen back. Called when training is over, however it ended; may be called twice."""
