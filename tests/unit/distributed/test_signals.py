"""Handlers of signals: whose stay, whose come back, and what is passed on."""

import os
import signal
import sys
import threading

import pytest

from online_dpo.distributed.signals import (
    STOP_SIGNALS,
    StoppedBySignal,
    handling,
    is_interruption,
    name_of,
    raise_stopped,
    write_now,
)
from online_dpo.errors import TrainingInterrupted, TrainingTerminated
from support.processes import run_python


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=name_of)
def test_a_signal_is_handled_inside_and_not_afterwards(number):
    before, received = signal.getsignal(number), []
    with handling(received.append):
        signal.raise_signal(number)
    assert received == [number] and signal.getsignal(number) is before


def test_ignored_signals_and_other_handlers_stay():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handling(raise_stopped):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_came_before_counts_inside():
    outer, inner = [], []
    with handling(outer.append):
        signal.raise_signal(signal.SIGTERM)
        with handling(inner.append) as handled:
            assert inner == [signal.SIGTERM] and handled.inside_another
        signal.raise_signal(signal.SIGUSR1)
    assert outer == [signal.SIGTERM, signal.SIGUSR1]


def test_other_threads_and_an_error_inside():
    def raise_in_thread():
        with handling(raise_stopped) as handled:
            seen.append(handled.previous)

    seen = []
    thread = threading.Thread(target=raise_in_thread)
    thread.start()
    thread.join()
    assert seen == [{}]
    with pytest.raises(StoppedBySignal, match="Stopped by SIGTERM"), handling(raise_stopped):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_child_process_ends_as_by_default():
    """A worker that loads data must end when it is told to."""
    with handling(raise_stopped):
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_ctrl_c_can_be_told_from_an_error_of_that_class():
    assert is_interruption(KeyboardInterrupt()) and not is_interruption(SystemExit())
    with handling(raise_stopped):
        assert not is_interruption(KeyboardInterrupt())
        assert is_interruption(StoppedBySignal(signal.SIGINT)) and is_interruption(TrainingInterrupted("x", None))


def test_a_script_that_does_not_catch_it_ends_with_the_code_of_the_signal():
    code = "import signal; from online_dpo.errors import *; raise TrainingTerminated('stopped', None, signal.SIGTERM)"
    done = run_python("-c", code)
    assert (done.returncode, done.stderr) == (143, "")
    assert TrainingTerminated("x", "folder", signal.SIGTERM).checkpoint == "folder"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such device")
def test_a_terminal_that_is_gone_is_no_error():
    code = "import os; from online_dpo.distributed.signals import write_now; os.close(2); write_now('x')"
    assert run_python("-c", code).returncode == 0
    write_now("")
