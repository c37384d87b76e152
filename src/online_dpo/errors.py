"""The error classes of this package, for events in a run that a caller may want to catch.

Wrong input raises a plain ``ValueError`` or ``TypeError`` whose message says what to do.
"""

from __future__ import annotations


class OnlineDPOError(Exception):
    """Base class of the package's own errors."""


class InvalidPromptError(OnlineDPOError, ValueError):
    """A dataset row cannot be used as a prompt. The message names the row."""


class ScoringError(OnlineDPOError, ValueError):
    """A reward function, reward model or judge failed, or returned something that is no score. The message names it."""


class UnknownTokenError(OnlineDPOError, ValueError):
    """A model would be given a token id for which it has no embedding. The message has the numbers and what to do."""


class ForeignCodeError(OnlineDPOError, RuntimeError):
    """Code of the user or of another package failed: a callback, a metric, a data collator, a dataset, an optimizer.
    The message names it, and the original error is chained.
    """


class RolloutServerError(OnlineDPOError, RuntimeError):
    """A vLLM server could not be used. The message has its address and the last cause."""


class FeedbackStopped(ScoringError):
    """Feedback cannot continue: it has spent its budget, fails too often, or is refused. The run is saved in a
    checkpoint; the message says what to change before it is resumed.
    """


class OutOfSyncError(OnlineDPOError, RuntimeError):
    """An engine that holds its own copy of the weights does not have the trainer's weights."""


class FeedbackLostError(OnlineDPOError, RuntimeError):
    """Another process of the run could not get its completions or scores; the error of that process says why."""


class TrainingDivergedError(OnlineDPOError, RuntimeError):
    """The loss or gradient of too many steps in a row was not finite. A checkpoint was saved before this was raised."""


class NothingTrainedError(OnlineDPOError, RuntimeError):
    """A run ended, and no step of it trained anything. The message counts the reasons; if there were steps, a
    checkpoint was saved before this was raised.
    """


class CheckpointError(OnlineDPOError, RuntimeError):
    """A checkpoint or a model could not be saved, or a checkpoint cannot be resumed from. The message names the folder
    and, where it is one file, the file.
    """


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run. The message says how to continue; ``checkpoint`` is the checkpoint saved last, if any.

    It is a `KeyboardInterrupt`, so that a script ends as it would have without this class.
    """

    def __init__(self, message: str, checkpoint: str | None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


def error_text(error: BaseException, *, first_line: bool = False) -> str:
    """The message of an error in one line; if it is empty, its type and its cause.

    With ``first_line``, only the message's first line: in torch's errors a C++ stack trace follows.

    >>> error_text(TimeoutError())
    'TimeoutError'
    """
    text = str(error).strip()
    text = " ".join((text.partition("\n")[0] if first_line else text).split())
    if text:
        return text
    cause = error.__cause__ or error.__context__
    return type(error).__name__ + (f" (because of {named_error(cause)})" if cause is not None else "")


def named_error(error: BaseException, *, first_line: bool = False) -> str:
    """The type and the message of an error, in one line.

    >>> named_error(ConnectionError("away")), named_error(ConnectionError())
    ('ConnectionError: away', 'ConnectionError')
    """
    text, name = error_text(error, first_line=first_line), type(error).__name__
    return text if text.split(" ")[0] == name else f"{name}: {text}"
