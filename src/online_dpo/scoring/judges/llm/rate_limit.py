"""Limits of an endpoint that the coroutines of one event loop share: requests and tokens per minute, and cost."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from online_dpo.errors import FeedbackStopped

MINUTE = 60.0


@dataclass
class Entry:
    """A request that counts against the limits: its start time, and its tokens (an estimate until they are known)."""

    time: float
    tokens: int


class RateLimiter:
    """Allows at most ``requests`` requests and ``tokens`` tokens in any ``period`` seconds, first come, first served.

    ``acquire`` takes an estimate of the tokens; the caller corrects ``tokens`` of the returned entry when the response
    is there. A request that is larger than the whole limit runs alone.
    """

    def __init__(self, requests: int | None, tokens: int | None, period: float = MINUTE) -> None:
        self._requests = requests
        self._tokens = tokens
        self._period = period
        self._entries: deque[Entry] = deque()
        self._turn = asyncio.Lock()

    async def acquire(self, tokens: int) -> Entry:
        """Wait until a request of about ``tokens`` tokens may start, and count it."""
        async with self._turn:
            loop = asyncio.get_running_loop()
            while (pause := self._pause(loop.time(), tokens)) > 0:
                await asyncio.sleep(pause)
            entry = Entry(loop.time(), tokens)
            if self._requests is not None or self._tokens is not None:
                self._entries.append(entry)
            return entry

    def _pause(self, now: float, tokens: int) -> float:
        """Seconds until the oldest entry expires, or 0 if the request fits within the limits now."""
        while self._entries and self._entries[0].time + self._period <= now:
            self._entries.popleft()
        if not self._entries:
            return 0.0
        too_many = self._requests is not None and len(self._entries) >= self._requests
        used = sum(entry.tokens for entry in self._entries) if self._tokens is not None else 0
        too_large = self._tokens is not None and used + tokens > self._tokens
        return self._entries[0].time + self._period - now if too_many or too_large else 0.0


class Budget:
    """The cost that all requests together may have. Used within one event loop.

    Args:
        cap: the limit; ``None`` for no limit.
    """

    def __init__(self, cap: float | None) -> None:
        self.spent = 0.0
        self._cap = cap
        self._reserved: list[float] = []
        self._released = asyncio.Event()

    @asynccontextmanager
    async def reserve(self, estimate: float) -> AsyncIterator[None]:
        """Reserve the estimated cost of a request while it runs. The caller adds the actual cost to ``spent``.

        Near the limit, a request waits until earlier ones have ended, since they usually cost less than was reserved.

        Raises:
            FeedbackStopped: the request could cost more than is left.
        """
        while self._reserved and not self._fits(estimate):
            self._released.clear()
            await self._released.wait()
        if not self._fits(estimate):
            raise FeedbackStopped(
                f"The judge has spent {self.spent:.4g}, and the next question may cost {estimate:.2g}: more than "
                f"`max_cost`, {self._cap:g}. The answers so far are in the cache; raise `max_cost` to go on."
            )
        self._reserved.append(estimate)
        try:
            yield
        finally:
            self._reserved.remove(estimate)
            self._released.set()

    def _fits(self, estimate: float) -> bool:
        return self._cap is None or self.spent + sum(self._reserved) + estimate <= self._cap
