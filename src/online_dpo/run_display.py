"""What shows a run while it trains, as the trainer knows it."""

from __future__ import annotations

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import is_in_notebook


class RunDisplay(TrainerCallback):
    """A callback that shows a run. The trainer leaves transformers' own output out where it has one of these."""

    def on_interrupt(self, notice: str) -> bool:
        """Ctrl-C was pressed, and the run stops after this step. Returns whether this display shows ``notice``.

        Called inside a signal handler, which may have come in the middle of anything: it may only set attributes.
        """
        return False

    def close(self) -> None:
        """Give the screen back. Called when training is over, however it ended; may be called twice."""


def choose_displays(trainer: Trainer) -> list[RunDisplay]:
    """The displays of a trainer: those that its user gave, or in a notebook a table of ours in place of transformers'
    own, which shows nothing but the loss. Where there is one, transformers' bar and printed logs are removed.
    """
    callbacks = trainer.callback_handler.callbacks
    displays = [callback for callback in callbacks if isinstance(callback, RunDisplay)]
    replaced: tuple[type, ...] = (PrinterCallback, ProgressCallback)
    if is_in_notebook():
        from transformers.utils.notebook import NotebookProgressCallback

        from online_dpo.notebook import NotebookDisplay

        if not displays and any(type(callback) is NotebookProgressCallback for callback in callbacks):
            displays = [NotebookDisplay()]
            trainer.add_callback(displays[0])
        replaced = (*replaced, NotebookProgressCallback)
    if displays:
        callbacks[:] = [callback for callback in callbacks if type(callback) not in replaced]
    return displays
