"""Tiny runs in forks of this process, which kill themselves at a chosen change of the disk."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def forked(action: Callable[[], None]) -> int:
    """Runs ``action`` in a fork; returns its exit code, 0 if it returned, or minus the signal that killed it."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def count_changes(folder: Path, reached: Callable[[int, str], None]) -> None:
    """From now on, ``reached`` is called before each change of the disk below ``folder`` that Python makes, and before
    each fsync, with the number of changes before it and its name. It cannot be taken back: for a fork.
    """
    state = {"number": 0, "inside": False}

    def change(what: str) -> None:
        if not state["inside"]:
            state["inside"] = True
            reached(state["number"], what)
            state["number"] += 1
            state["inside"] = False

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(folder) in str(args[0]):
            change(f"{event} {args[0]}")

    def fsync(descriptor: int) -> None:
        change(f"fsync {os.readlink(f'/proc/self/fd/{descriptor}')}")

    sys.addaudithook(hook)
    os.fsync = fsync


def kill_at(folder: Path, number: int) -> None:
    """Kills this process before a change of the disk (see `count_changes`)."""

    def reached(now: int, what: str) -> None:
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    count_changes(folder, reached)


def limit_file_size(size: int) -> None:
    """No file of this process may grow beyond ``size`` bytes: a write beyond it fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
