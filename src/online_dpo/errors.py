"""Errors of this package. Wrong input raises ``ValueError`` or ``TypeError`` with what to do about it; the classes here
are for events in a run that a caller may want to catch."""

from __future__ import annotations


class OnlineDPOError(Exception):
    """Base class of the package's own errors."""


class InvalidPromptError(OnlineDPOError, ValueError):
    """A dataset row cannot be used as a prompt. The message names the row."""


class ScoringError(OnlineDPOError, ValueError):
    """A reward function, reward model or judge failed or returned something that is no score. The message names it."""


class UnknownTokenError(OnlineDPOError, ValueError):
    """A model would be given a token that it has no embedding for. The message has the numbers and what to do."""


class ForeignCodeError(OnlineDPOError, RuntimeError):
    """Code that is not this package's failed: a callback, a metric, a data collator, a dataset, an optimizer. The
    message names it, and the original error is chained.
    """


class RolloutServerError(OnlineDPOError, RuntimeError):
    """A vLLM server could not be used. The message names its address and the last cause."""


class FeedbackStopped(ScoringError):
    """Going on makes no sense: feedback has used up its money, fails too often, or is refused. The run is worth a
    checkpoint; the message says what to change before it is resumed.
    """


class OutOfSyncError(OnlineDPOError, RuntimeError):
    """An engine that samples with weights of its own does not have the trainer's."""


class FeedbackLostError(OnlineDPOError, RuntimeError):
    """Another process of the run could not get its completions or scores; its own error says why."""


class TrainingDivergedError(OnlineDPOError, RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite. A checkpoint was saved before this was
    raised.
    """


class NothingTrainedError(OnlineDPOError, RuntimeError):
    """A run came to its end, and no step of it trained anything. The message counts why; if there were steps, a
    checkpoint was saved before this was raised.
    """


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run. The message says how to go on; ``checkpoint`` is the folder that was saved last, if any.

    A `KeyboardInterrupt`, so that a script ends as it would without the checkpoint.
    """

    def __init__(self, message: str, checkpoint: str | None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


def error_text(error: BaseException, *, first_line: bool = False) -> str:
    """What an error says, in one line; where it says nothing, its type and what caused it. torch's errors go on with a
    stack of C++ behind their first line.

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
    """The type of an error and what it says.

    >>> named_error(ConnectionError("away")), named_error(ConnectionError())
    ('ConnectionError: away', 'ConnectionError')
    """
    text, name = error_text(error, first_line=first_line), type(error).__name__
    return text if text.split(" ")[0] == name else f"{name}: {text}"
