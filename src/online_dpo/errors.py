"""The error classes of this package, for events in a run that a caller may want to catch.

Wrong input raises a plain ``ValueError`` or ``TypeError`` whose message says what to do.
"""

from __future__ import annotations

import signal


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
    """The loss or gradient of too many steps in a row was not finite, or the weights themselves are not. The message
    names the checkpoint that holds the last finite weights.
    """


class TrainingStalledError(OnlineDPOError, RuntimeError):
    """Too many steps in a row trained nothing. A checkpoint was saved before this was raised; the message counts the
    reasons.
    """


class NothingTrainedError(OnlineDPOError, RuntimeError):
    """A run ended, and no step of it trained anything. The message counts the reasons; if there were steps, a
    checkpoint was saved before this was raised.
    """


class CheckpointError(OnlineDPOError, RuntimeError):
    """A checkpoint or a model could not be saved, or a checkpoint cannot be resumed from. The message names the folder
    and, where it is one file, the file.
    """


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped a run. The message says how to continue; ``checkpoint`` is the checkpoint saved last, if any,
    and ``signal`` the signal, such as ``signal.SIGINT`` for Ctrl-C.

    It is a `KeyboardInterrupt`, so that a script ends as it would have without this class.
    """

    def __init__(self, message: str, checkpoint: str | None, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__(message)
        self.checkpoint, self.signal = checkpoint, number


class TrainingTerminated(TrainingInterrupted, SystemExit):
    """Another signal than Ctrl-C stopped a run, such as SIGTERM.

    As a `SystemExit` it ends a script that does not catch it with the exit code that schedulers expect, 128 plus the
    signal's number.
    """

    def __init__(self, message: str, checkpoint: str | None, number: signal.Signals) -> None:
        super().__init__(message, checkpoint, number)
        self.code = 128 + number


SHOWN_CHARACTERS = 2000
"""An error's message is cut after as many: some libraries put a whole answer or tensor into it."""


def error_text(error: BaseException, *, first_line: bool = False) -> str:
    """The message of an error in one line that a terminal can show; if it is empty, its type and its cause.

    With ``first_line``, only the message's first line: in torch's errors a C++ stack trace follows. Of a group of
    errors, the message also names the first few.

    >>> error_text(TimeoutError())
    'TimeoutError'
    """
    text = _own_text(error).strip()
    text = one_line(text.partition("\n")[0] if first_line else text)
    if isinstance(error, BaseExceptionGroup):
        return f"{text}: {'; '.join(named_error(part) for part in error.exceptions[:3])}"
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


def one_line(text: str) -> str:
    """A text in one line: white space is one blank, other control characters (such as those that colour a terminal or
    clear its screen) are escaped, and what is too long is cut.

    >>> one_line("no\\n answer\\x1b[2J")
    'no answer\\\\x1b[2J'
    """
    beginning = text[: 4 * SHOWN_CHARACTERS]
    line = " ".join(beginning.split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:SHOWN_CHARACTERS])
    is_cut = len(line) > SHOWN_CHARACTERS or len(text) > len(beginning)
    return f"{shown}... ({len(text)} characters)" if is_cut else shown


def _own_text(error: BaseException) -> str:
    """The message; that of an exception of other code may fail itself."""
    try:
        return str(error)
    except Exception as second:
        return f"(its message cannot be shown: {type(second).__name__})"
