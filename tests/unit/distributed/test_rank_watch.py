"""What two watches know of each other through a store; stopped and killed processes: `tests/faults/cases_ranks.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
from torch.distributed import DistBackendError, PrefixStore, TCPStore

from online_dpo.distributed import rank_watch
from online_dpo.distributed.rank_watch import RankWatch, explained
from online_dpo.distributed.waiting import Waits
from online_dpo.errors import RankLostError, ScoringError
from support.busy import tries

CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5")
TIMED_OUT = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation")


@pytest.fixture
def store():
    return PrefixStore("test", TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False))


@contextmanager
def watches(store, *ranks, size=2, **options):
    made = [RankWatch(store, rank, size, 5, None, waits=Waits(60, print), **options) for rank in ranks]
    for watch in made:
        watch.start()
    yield made
    for watch in made:
        watch.close()
    time.sleep(0.1)


def soon(holds, seconds=60.0):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


@tries(3)
def test_a_rank_that_hangs_in_a_function_is_named_with_its_seconds_and_its_steps(store):
    with watches(store, 0, 1) as (first, second), second._waits.waiting_for("Reward function `f`"):
        second.step = 12
        soon(lambda: re.search(r"for [1-9]\d* s", first.describe_others()))  # a busy machine may miss a second
        error = first.explain(TIMED_OUT)
        assert re.fullmatch(
            r"Rank 1 has been in Reward function `f` for [1-9]\d* s \(after step 12\)\. This process waited for "
            r"`ddp_timeout`, 5 seconds\.",
            str(error),
        )
        assert error.ranks == (1,) and first.missing() == []


@tries(3)
def test_a_rank_that_waits_for_others_is_not_to_blame(store):
    with watches(store, 0, 1) as (first, second), second._waits.waiting_for("the other processes", on_ranks=True):
        soon(lambda: first._seen[1].number > 1)
        assert first.describe_others() == ""
        error = first.explain(TIMED_OUT)
        assert str(error).startswith("The other processes do not answer, although none of them is known to be missing")
        assert error.ranks == ()


@tries(3)
def test_a_rank_that_has_failed_is_named_with_its_error(store):
    with watches(store, 0, 1) as (first, second):
        soon(lambda: first._seen[1].number == second._number > 0)
        second.step = 3  # which no beat has told yet
        second.tell_failure(ValueError("no\nroom."))
        error = first.explain(CLOSED)
        assert str(error) == "Rank 1 has failed after step 3: ValueError: no room."
        assert error.ranks == (1,)


@tries(3)
def test_a_rank_is_told_that_it_is_to_blame(store):
    with watches(store, 0, 1) as (first, second):
        first.tell_failure(RankLostError("Rank 1 has been in a function.", [1]))
        soon(lambda: second._blamed is not None and second.missing() == [0])
        assert first._blamed is None


def test_a_rank_that_never_began_is_named(store):
    with watches(store, 0) as (first,):
        error = first.explain(CLOSED)
        assert str(error).startswith("Rank 1 has not been heard of since the start, ") and error.ranks == (1,)


@tries(3)
def test_a_rank_that_falls_silent_is_named_with_what_it_did(store):
    with watches(store, 0, 1) as (first, second), second._waits.waiting_for("Judge `j`"):
        second.step = 4
        soon(lambda: first._seen[1].step == 4)
        second.close()
        start = time.monotonic()
        error = first.explain(CLOSED)
        assert 2.0 < time.monotonic() - start < 60.0
        said = "(after step 4, in Judge `j`): it was stopped or killed, has ended, or its machine cannot be reached."
        assert str(error).startswith("Rank 1 has not been heard of for ") and str(error).endswith(said)


def test_many_missing_ranks_are_cut(store):
    with watches(store, 0, size=6) as (first,):
        error = first.explain(CLOSED)
        assert str(error).count("has not been heard of") == 3 and str(error).endswith("2 more ranks are missing.")
        assert error.ranks == (1, 2, 3, 4, 5)


def test_ranks_read_what_others_have_written(store):
    with watches(store, 0, 1) as (first, second):
        assert first.get("random") is None
        second.put("random", b"\x00\xff")
        soon(lambda: first.get("random") == b"\x00\xff")  # a store does not confirm what is written


HOLDER = """
import os, signal, sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGSTOP)
"""


@tries(3)
def test_a_store_whose_process_is_stopped_is_waited_for_no_longer_than_it_may_take(monkeypatch):
    monkeypatch.setattr(rank_watch, "STORE_SECONDS", 1.0)
    words = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        store = TCPStore("127.0.0.1", int(holder.stdout.readline()), None, False, timedelta(seconds=5))
        watch = RankWatch(PrefixStore("test", store), 1, 2, 5, 0, waits=Waits(60, print))
        watch.put("note", b"text")
        assert watch.get("note") == b"text" and not watch.has_lost_store
        holder.stdin.write("stop\n")
        holder.stdin.flush()
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED)
        began = time.monotonic()
        assert watch.get("note") is None and watch.get("note") is None
        assert time.monotonic() - began < 4.0
        assert watch.has_lost_store and watch.missing() == [0]
        holder.kill()


def test_only_errors_of_collective_operations_are_explained(store, monkeypatch):
    assert explained(CLOSED) is CLOSED  # a single process
    with watches(store, 0) as (first,):
        monkeypatch.setattr(rank_watch, "_watch", first)
        full = DistBackendError("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error\nCuda failure 2 'out of memory'")
        shapes = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        for error in (shapes, ValueError("gloo"), ScoringError("x"), full):
            assert explained(error) is error
        assert isinstance(explained(CLOSED), RankLostError)
        other_words = RuntimeError("unheard of")
        assert isinstance(explained(other_words), RankLostError)  # a rank is known to be missing by now


@pytest.mark.parametrize(
    "text",
    [
        str(CLOSED),
        str(TIMED_OUT),
        "Application timeout caused pair closure",
        "NCCL error in: ProcessGroupNCCL.cpp:1234, remote process exited",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
    ],
)
def test_errors_of_backends_are_known(text):
    assert rank_watch.BACKEND_ERROR.search(text)
