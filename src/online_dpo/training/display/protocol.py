"""The interface between the trainer and a display of its progress."""

from __future__ import annotations

from transformers import TrainerCallback


class RunDisplay(TrainerCallback):
    """A callback that shows a run. It replaces transformers' own output."""

    def on_interrupt(self, notice: str) -> bool:
        """Handle Ctrl-C, after which the run stops at the end of the step. Returns whether ``notice`` is displayed.

        It is called inside a signal handler, which may interrupt any code, so it may only set attributes.
        """
        return False

    def close(self) -> None:
        """Release the screen. It is called when training ends for any reason, and may be called twice."""
