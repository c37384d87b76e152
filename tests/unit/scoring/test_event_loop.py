"""The event loop of async rewards outlives what they do to it."""

import asyncio

import pytest

from online_dpo.errors import ScoringError
from online_dpo.scoring.event_loop import submit, wait_for


async def answer(number):
    await asyncio.sleep(0)
    return number


def test_a_coroutine_that_stops_the_loop_and_the_others_end():
    async def stops():
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        return "stopped"

    slow = submit(asyncio.sleep(0.05, "slow"))
    assert wait_for(submit(stops())) == "stopped"
    assert wait_for(slow) == "slow" and wait_for(submit(answer(3))) == 3


@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt])
def test_a_coroutine_that_ends_the_program_ends_itself(ending):
    async def leaves():
        raise ending

    with pytest.raises(ending):
        wait_for(submit(leaves()))
    assert wait_for(submit(answer(3))) == 3


def test_those_who_wait_are_told_of_a_closed_loop():
    async def closes_later():
        loop = asyncio.get_running_loop()
        stop = loop.stop

        def close():
            stop()
            loop.call_soon = None  # nothing more runs
            loop.run_forever = loop.close

        loop.call_soon(close)
        await asyncio.sleep(60)

    with pytest.raises(ScoringError, match="The event loop of async rewards and judges was closed"):
        wait_for(submit(closes_later()))
    assert wait_for(submit(answer(3))) == 3
