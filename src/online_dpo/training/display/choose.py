"""Chooses the displays of a trainer: those that the user gave, else in a notebook a table."""

from __future__ import annotations

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.import_utils import is_in_notebook

from online_dpo.training.display.protocol import RunDisplay


def choose_displays(trainer: Trainer) -> list[RunDisplay]:
    """Return the displays of a trainer, and remove transformers' progress bar and printed logs if there are any.

    The displays are those that the user gave, or else, in a notebook, a table that replaces transformers' own, which
    shows only the loss.
    """
    callbacks = trainer.callback_handler.callbacks
    displays: list[RunDisplay] = [callback for callback in callbacks if isinstance(callback, RunDisplay)]
    replaced: tuple[type, ...] = (PrinterCallback, ProgressCallback)
    if is_in_notebook():
        from transformers.utils.notebook import NotebookProgressCallback

        from online_dpo.training.display.notebook import NotebookDisplay

        if not displays and any(type(callback) is NotebookProgressCallback for callback in callbacks):
            displays.append(NotebookDisplay())
            trainer.add_callback(displays[0])
        replaced = (*replaced, NotebookProgressCallback)
    if displays:
        callbacks[:] = [callback for callback in callbacks if type(callback) not in replaced]
    return displays
