"""Limits of an endpoint that many coroutines of one event loop share: requests and tokens in a time, and money."""

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
    """A request that counts against the limits: when it began, and its tokens, estimated until they are known."""

    time: float
    tokens: int


class RateLimiter:
    """No more than so many requests and tokens in any ``period`` seconds. Who comes first goes first.

    Tokens are known only afterwards: ``acquire`` takes an estimate, and the entry's ``tokens`` are to be corrected. A
    request that is larger than the whole limit goes alone.
    """

    def __init__(self, requests: int | None, tokens: int | None, period: float = MINUTE) -> None:
        self._requests = requests
        self._tokens = tokens
        self._period = period
        self._entries: deque[Entry] = deque()
        self._turn = asyncio.Lock()

    async def acquire(self, tokens: int) -> Entry:
        """Wait until a request of about so many tokens may begin."""
        async with self._turn:
            loop = asyncio.get_running_loop()
            while (pause := self._pause(loop.time(), tokens)) > 0:
                await asyncio.sleep(pause)
            entry = Entry(loop.time(), tokens)
            if self._requests is not None or self._tokens is not None:
                self._entries.append(entry)
            return entry

    def _pause(self, now: float, tokens: int) -> float:
        """Seconds until the oldest entry leaves, if there is no room beside it."""
        while self._entries and self._entries[0].time + self._period <= now:
            self._entries.popleft()
        if not self._entries:
            return 0.0
        too_many = self._requests is not None and len(self._entries) >= self._requests
        used = sum(entry.tokens for entry in self._entries) if self._tokens is not None else 0
        too_large = self._tokens is not None and used + tokens > self._tokens
        return self._entries[0].time + self._period - now if too_many or too_large else 0.0


class Budget:
    """Money that requests may cost together. Used within one event loop.

    Args:
        cap: most that may be spent; ``None`` is no limit.
    """

    def __init__(self, cap: float | None) -> None:
        self.spent = 0.0
        self._cap = cap
        self._held: list[float] = []
        self._given_back = asyncio.Event()

    @asynccontextmanager
    async def reserve(self, estimate: float) -> AsyncIterator[None]:
        """Holds the estimated cost of a request while it runs; what it did cost is to be added to ``spent``.

        Near the cap a request waits for those before it, which usually cost less than was held for them.

        Raises:
            FeedbackStopped: it could spend more than is left.
        """
        while self._held and not self._fits(estimate):
            self._given_back.clear()
            await self._given_back.wait()
        if not self._fits(estimate):
            raise FeedbackStopped(
                f"The judge has spent {self.spent:.4g}, and the next question may cost {estimate:.2g}: more than "
                f"`max_cost`, {self._cap:g}. The answers so far are in the cache; raise `max_cost` to go on."
            )
        self._held.append(estimate)
        try:
            yield
        finally:
            self._held.remove(estimate)
            self._given_back.set()

    def _fits(self, estimate: float) -> bool:
        return self._cap is None or self.spent + sum(self._held) + estimate <= self._cap
