"""The error classes of this package, for events in a run that a caller may want to catch.

Wrong input raises a plain ``ValueError`` or ``TypeError`` whose message says what to do.
"""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Sequence

LONGEST_ERROR = 2000
"""Characters of an error that are shown: a service, or a library, may put a whole answer into its message."""

_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, moves of the cursor
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]{0,4096}(?:\x07|\x1b\\|\x9c)"  # titles, clipboard, links
    r"|\x1b[ -/]*[0-~]"
)


class OnlineDPOError(Exception):
    """Base class of the package's own errors."""


class InvalidPromptError(OnlineDPOError, ValueError):
    """A dataset row cannot be used as a prompt. The message names the row."""


class ScoringError(OnlineDPOError, ValueError):
    """A reward function, reward model or judge failed, or returned something that is no score. The message names it."""


class ModelFolderError(OnlineDPOError, ValueError):
    """A model's folder, or what the hub has under its name, cannot be used. The message names it and what is wrong."""


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


class RankLostError(OnlineDPOError, RuntimeError):
    """Another process of the run was stopped or killed, hangs, or has failed. The message names it; ``ranks`` are those
    that are missing, as far as known.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class WholeModelDoesNotFit(OnlineDPOError, MemoryError):
    """A sharded model has to be whole in the memory of each process for a while, and does not fit there."""


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


_OUT_OF_MEMORY = re.compile(
    r"(?i:out of memory|not enough memory|(?:can't|cannot|unable to) allocate memory)"  # CUDA, HIP, MPS, the host
    r"|bad_alloc"  # of C++, in torch's wrapping
    r"|_ALLOC_FAILED|ALLOCATION_FAILED|StatusAllocFailed|rocblas_status_memory_error"  # cuBLAS, cuDNN, cuSOLVER, ROCm's
    r"|OUT_OF_(?:\w+_)?MEMORY|UR_RESULT_ERROR_OUT_OF_RESOURCES"  # drivers; XPU says either
    r"|(?:CUBLAS|CUSOLVER|CUSPARSE|HIPBLAS)_STATUS_NOT_INITIALIZED,? when calling `\w*Create"  # no room for a handle
    r"|CUDNN_STATUS_NOT_INITIALIZED"
    r"|Failed to CUDA (?:c|m|host )alloc"  # NCCL
    r"|Invalid buffer size"  # MPS: more than its largest buffer
)
"""What a `RuntimeError` says where memory has run out. Not that of a kernel ("out of resource: shared memory"), which
no smaller batch helps, nor an error that leaves the device unusable ("illegal memory access").
"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out: `MemoryError`, `torch.OutOfMemoryError` (known by its name, for
    torch is not loaded here), what libraries raise in their places, or an error of others that was raised because of
    one of these. This package's own errors say it by their class alone: their text may be that of another machine.
    """
    kinds = {(kind.__module__, kind.__name__) for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or ("torch", "OutOfMemoryError") in kinds:
        return True
    if isinstance(error, OnlineDPOError) or not isinstance(error, Exception):
        return False
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(_own_text(error)):
        return True
    within = error.exceptions if isinstance(error, ExceptionGroup) else ()
    causes = within if error.__cause__ is None else (*within, error.__cause__)
    return any(is_out_of_memory(cause) for cause in causes)


def printable(text: str) -> str:
    """A text without what could act on a terminal or mislead its reader: escape sequences, control characters, marks
    that reverse the direction of writing. Line ends and tabs become blanks.

    >>> printable("\\x1b[2Jgone\\u202egnp.exe\\n")
    'gonegnp.exe '
    """
    if text.isprintable():
        return text
    text = _ESCAPES.sub("", text)
    return "".join(character if character.isprintable() else " " * character.isspace() for character in text)


def one_line(text: str, longest: int = LONGEST_ERROR) -> str:
    """A text that was written by others, for a message: in one line, printable, and not longer than ``longest``.

    >>> one_line("\\x1b[31mno\\x1b[0m\\n  such file", longest=10)
    'no such fi...'
    """
    text = " ".join(printable(text[: 4 * longest + LONGEST_ERROR]).split())
    return text if len(text) <= longest else f"{text[:longest]}..."


def error_text(error: BaseException, *, first_line: bool = False) -> str:
    """The message of an error in one line, printable (see `one_line`); if it is empty, its type and its cause.

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


def _own_text(error: BaseException) -> str:
    """The message; that of an exception of other code may fail itself."""
    try:
        return str(error)
    except Exception as second:
        return f"(its message cannot be shown: {type(second).__name__})"
