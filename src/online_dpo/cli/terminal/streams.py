"""Standard output and standard error that may break: a closed pipe, a full disk, a terminal that went away.

Heavy packages must not be imported here.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

STDOUT, STDERR = "standard output", "standard error"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""After these errors, later writes may succeed again."""


class SturdyStream:
    """A text stream whose writes never fail. The first failure is kept in ``failure`` and told; what cannot be written
    afterwards is dropped. A character that the stream's encoding does not have is written as an escape.

    Args:
        stream: the stream; ``None`` if it was closed when the process started.
        name: its name in messages.
        tell: called with the message of the first failure.

    ``instead``, if it is set, is the stream that gets what is written once this one is gone.
    """

    instead: SturdyStream | None = None

    def __init__(self, stream: TextIO | None, name: str, tell: Callable[[str], None] = lambda message: None) -> None:
        self._stream, self.name_shown, self.tell = stream or cast(TextIO, io.StringIO()), name, tell
        self.failure: OSError | None = None
        self._is_gone = stream is None
        if stream is None:
            self.failure = OSError(errno.EBADF, "it is closed")

    def write(self, text: str) -> int:
        """Write, or drop, a text."""
        if not self._is_gone:
            self._attempt(lambda: self._write(text))
        if self._is_gone and self.instead is not None:
            self.instead.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        if not self._is_gone:
            self._attempt(self._stream.flush)

    def close(self) -> None:
        """Flush: code of others that closes the stream must not keep the run from telling how it ends."""
        self.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal that can still be written to."""
        return not self._is_gone and self._stream.isatty()

    def end(self) -> None:
        """Write the rest. What cannot be written is dropped for good, or Python would try again when it exits."""
        self.flush()
        if self.failure is not None:
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        if self.instead is not None:
            self._stream.flush()  # what fails now is known to be this text

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._failed(error)
        except ValueError as error:  # closed by other code
            self._failed(OSError(errno.EBADF, str(error)))

    def _failed(self, error: OSError) -> None:
        is_first, self.failure = self.failure is None, self.failure or error
        if error.errno not in FULL:
            self._give_up()
        if is_first:
            self.tell(f"{self.name_shown} cannot be written ({error.strerror or error})")

    def _give_up(self) -> None:
        """Send what comes later nowhere, also what other libraries and child processes write to the same descriptor."""
        self._is_gone = True
        with suppress(OSError, ValueError):  # it is closed, or has no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class Streams:
    """The two standard streams of a command. What cannot be written to standard error goes to standard output.

    Args:
        stdout, stderr: the streams that they stand for.
    """

    def __init__(self, stdout: TextIO | None, stderr: TextIO | None) -> None:
        self.stdout, self.stderr = SturdyStream(stdout, STDOUT), SturdyStream(stderr, STDERR)

    def tell_failures(self) -> None:
        """From now on, say at once, on the other stream, when one of them fails: the command goes on without it."""
        self.stderr.instead = self.stdout
        for stream, other in ((self.stdout, self.stderr), (self.stderr, self.stdout)):

            def tell(message: str, other: SturdyStream = other) -> None:
                other.write(f"warning: {message}; the run goes on without it.\n")
                other.flush()

            stream.tell = tell
            if stream.failure is not None:
                tell(f"{stream.name_shown} cannot be written ({stream.failure.strerror})")

    def end(self) -> None:
        """Write what is buffered."""
        self.stdout.end()
        self.stderr.end()


@contextmanager
def sturdy_streams() -> Iterator[Streams]:
    """Inside, ``sys.stdout`` and ``sys.stderr`` are streams whose writes never fail."""
    before = sys.stdout, sys.stderr
    streams = Streams(*before)
    sys.stdout, sys.stderr = cast(TextIO, streams.stdout), cast(TextIO, streams.stderr)
    try:
        yield streams
    finally:
        sys.stdout, sys.stderr = before
        streams.end()


def open_standard_descriptors() -> None:
    """Open a standard descriptor that was closed when the process started: otherwise the next file that is opened gets
    its number, and what libraries print would be written into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
