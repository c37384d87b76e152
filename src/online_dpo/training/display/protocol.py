"""The interface between the trainer and a display of its progress."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainerCallback

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.training.samples import PairSample


class RunDisplay(TrainerCallback):
    """A callback that shows a run. It replaces transformers' own output."""

    def on_interrupt(self, notice: str) -> bool:
        """Handle Ctrl-C, after which the run stops at the end of the step. Returns whether ``notice`` is displayed.

        It is called inside a signal handler, which may interrupt any code, so it may only set attributes.
        """
        return False

    def pairs_shown(self, args: OnlineDPOConfig) -> int:
        """Return how many pairs of each log are to be shown; 0 for a display that shows none."""
        return 0

    def show_pairs(self, pairs: Sequence[PairSample]) -> None:
        """Show some pairs of the step of the latest log."""

    def close(self) -> None:
        """Release the screen. It is called when training ends for any reason, and may be called twice."""
