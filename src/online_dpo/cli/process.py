"""The ``online-dpo`` process from start to end, which nothing may hold up once the command has said how it ended.

Heavy packages must not be imported here.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from online_dpo.cli.main import main
from online_dpo.cli.terminal.streams import open_standard_descriptors
from online_dpo.errors import named_error

THREADS, AT_EXIT = (10.0, 5.0), (600.0, 60.0)
"""Seconds that threads, and functions registered with `atexit`, may go on after a success and after another end."""


def run() -> NoReturn:
    """Run the command line of this process, and end the process with its exit code."""
    open_standard_descriptors()
    # torch reads it when it is imported. Otherwise it prints a stack of C++ calls where another process is lost.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "--traceback" not in sys.argv:
        _tell_errors_in_one_line()
    try:
        code = main()
    except SystemExit as leaving:  # of the argument parser, which has printed why
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C now ends what goes on after the end
    end_within(code, THREADS[code != 0], AT_EXIT[code != 0])
    sys.exit(code)


def end_within(code: int, threads: float, at_exit: float) -> None:
    """From now on, end the process with an exit code if its threads, or then the functions registered with `atexit`,
    go on for longer than these seconds: a reward function that hangs, say.

    Python waits for threads without a limit. Their results are of no use any more.
    """
    reached_exit = threading.Event()
    atexit.register(reached_exit.set)  # the last one registered is called first, after threads have ended

    def watch() -> None:
        if reached_exit.wait(threads):
            time.sleep(at_exit)
            _end_now(code, "functions registered with `atexit`")
        others = [thread.name for thread in threading.enumerate() if not thread.daemon]
        _end_now(code, ", ".join(name for name in others if name != threading.main_thread().name))

    threading.Thread(target=watch, name="online-dpo-end", daemon=True).start()


def _end_now(code: int, waits_for: str) -> NoReturn:
    print(f"warning: the process ends without waiting any longer for: {waits_for}", file=sys.stderr)
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # broken, closed, or never there
            stream.flush()
    os._exit(code)


def _tell_errors_in_one_line() -> None:
    """Errors in threads, in functions registered with `atexit` and in destructors, which Python prints in full."""

    def tell(where: str) -> Callable[[BaseException | None], None]:
        def tell_error(error: BaseException | None) -> None:
            if error is not None and sys.stderr is not None:
                with suppress(OSError, ValueError):
                    print(f"warning: {where} raised {named_error(error)}", file=sys.stderr)

        return tell_error

    in_thread, elsewhere = tell("A thread"), tell("Code that runs at the end of the process or of an object")
    threading.excepthook = lambda arguments: in_thread(arguments.exc_value)
    sys.unraisablehook = lambda arguments: elsewhere(arguments.exc_value)
