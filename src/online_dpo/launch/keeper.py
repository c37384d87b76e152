"""Runs a command so that it never outlives the process that wants it: ``python keeper.py COMMAND ...``.

Ray's workers are killed at any time, and a killed process cannot end its children. This one waits for the command and
for the end of its own standard input, which the worker holds open: then it kills the command and all that it started.
It is run as a file and needs nothing but Python.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess  # nosec B404
import sys
import threading

PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run a command and return its exit code, or the negative number of the signal that killed it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's processes block SIGINT, which is inherited
    keeper = os.getpid()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=lambda: _end_with(keeper))  # nosec B603
    signal.signal(signal.SIGTERM, lambda number, _: _pass_on(child, number))
    signal.signal(signal.SIGINT, lambda number, _: _pass_on(child, number))
    threading.Thread(target=_watch_worker, daemon=True).start()
    return child.wait()


def _end_with(keeper: int) -> None:
    """In the child: the kernel kills it when the keeper is killed. It is told in time even if that has happened."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)


def _pass_on(child: subprocess.Popen[bytes], number: int) -> None:
    if child.poll() is None:
        child.send_signal(number)


def _watch_worker() -> None:
    """Wait until the worker closes its end, and kill this process and all that it started."""
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code < 0:  # as the command has ended
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    sys.exit(code)
