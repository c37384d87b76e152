"""What a process waits for, and the notices about it."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time

from online_dpo.distributed.waiting import WAITS, Waits
from online_dpo.foreign import foreign
from support.busy import tries


def names(waits):
    return [wait.who for wait in waits.innermost()]


def test_the_inner_one_of_two_is_named():
    waits = Waits(60, print)
    with waits.waiting_for("Scorer `f`"):
        with waits.waiting_for("Reward function `f`"):
            assert names(waits) == ["Reward function `f`"]
        assert names(waits) == ["Scorer `f`"]
    assert names(waits) == []


def test_other_threads_are_named_and_those_of_a_copied_context_are_parts():
    waits, begun, over = Waits(60, print), threading.Barrier(3), threading.Event()

    def work(who):
        with waits.waiting_for(who):
            begun.wait()
            over.wait()

    with waits.waiting_for("main"):
        context = contextvars.copy_context()
        threads = [
            threading.Thread(target=work, args=["own"]),
            threading.Thread(target=context.run, args=[work, "part"]),
        ]
        for thread in threads:
            thread.start()
        begun.wait()
        assert sorted(names(waits)) == ["own", "part"]
        over.set()
        for thread in threads:
            thread.join()
        assert names(waits) == ["main"]


def test_coroutines_are_named():
    waits, seen = Waits(60, print), []

    async def ask(number):
        with waits.waiting_for(f"Judge {number}"):
            await asyncio.sleep(0.01)
            seen.append(names(waits))

    async def both():
        with waits.waiting_for("Scorer"):
            await asyncio.gather(ask(1), ask(2))

    asyncio.run(both())
    assert seen[0] == ["Judge 1", "Judge 2"] and names(waits) == []


@tries(3)
def test_a_notice_comes_after_a_while_and_again_at_intervals():
    told = []
    waits = Waits(0.2, lambda notice: told.append((time.monotonic(), notice)))
    start = time.monotonic()
    with waits.waiting_for("Reward function `f`"):
        time.sleep(0.55)
    time.sleep(0.3)
    assert [notice for _, notice in told] == ["Waiting for 0 s: Reward function `f`."] * 2
    assert 0.2 <= told[0][0] - start < 0.4 and told[1][0] - told[0][0] >= 0.2


@tries(3)
def test_a_wait_that_is_short_gives_no_notice():
    told = []
    waits = Waits(0.2, told.append)
    with waits.waiting_for("Judge `j`"):
        for _ in range(8):
            with waits.waiting_for("question"):
                time.sleep(0.05)
    assert told == []


def test_a_notice_about_other_processes_says_what_is_known_of_them():
    waits = Waits(0.0, print)
    waits.details = lambda: "rank 1: Reward function `f` for 42 s"
    with waits.waiting_for("the other processes", on_ranks=True):
        assert waits.notice() == "Waiting for 0 s: the other processes (rank 1: Reward function `f` for 42 s)."
    with waits.waiting_for("Judge `j`"):
        assert waits.notice() == "Waiting for 0 s: Judge `j`."


def test_many_names_are_cut():
    waits, notice = Waits(0.0, print), None
    with waits.waiting_for("a"):
        contexts = [contextvars.Context() for _ in range(5)]
        opened = [context.run(waits.waiting_for, f"server {i}") for i, context in enumerate(contexts)]
        for context, one in zip(contexts, opened, strict=True):
            context.run(one.__enter__)
        notice = waits.notice()
        for context, one in zip(contexts, opened, strict=True):
            context.run(one.__exit__, None, None, None)
    assert notice == "Waiting for 0 s: a, server 0, server 1 and 3 more."


def test_foreign_code_is_named():
    with foreign("Callback `Mine` in `on_log`"):
        assert names(WAITS) == ["Callback `Mine` in `on_log`"]
    assert names(WAITS) == []


def test_a_forked_process_waits_for_nothing():
    with WAITS.waiting_for("Reward function `f`"):
        child = os.fork()
        if child == 0:
            with WAITS.waiting_for("own"):
                os._exit(0 if names(WAITS) == ["own"] else 1)
    assert os.waitpid(child, 0)[1] == 0
