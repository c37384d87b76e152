"""What is the same for all services that are asked over HTTP: a client with limits, and what counts as an answer.

A service may be broken, or be no service of ours at all. So nothing of it is read without a limit, no redirect is
followed (it would take the key, and what the policy wrote, to another place), and no number is made of what is none.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

from online_dpo.config.endpoints import in_own_network, shown_address
from online_dpo.errors import one_line

T = TypeVar("T")

LONGEST_ANSWER = 1 << 24
"""Bytes of an answer, besides what the question asks for."""

LONGEST_CAUSE = 300
"""Characters of what a service says that are shown."""


class AnswerRejected(Exception):
    """An answer is not read to its end: it is too long, or is compressed. The message says which."""


def http_library() -> Any:
    """The library that the openai client is built on: httpx, since openai 3 under the name httpx2."""
    from openai import DefaultAsyncHttpxClient

    base = DefaultAsyncHttpxClient.__base__
    assert base is not None
    return sys.modules[base.__module__.partition(".")[0]]


def client_options(url: str, longest: int) -> dict[str, Any]:
    """The options of an asynchronous client of that library for a service at an address.

    Answers of more than ``longest`` bytes raise `AnswerRejected` while they are read; so do compressed ones, which the
    client says that it does not take: a few bytes can become any number. Redirects are not followed. A proxy of the
    environment is not used for a service in the user's own network.
    """

    async def limit(response: Any) -> None:
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise AnswerRejected(f"the answer is compressed ({one_line(encoding, 40)}), which was not asked for")
        response.encoding = "utf-8"  # and not what the answer says: there are encodings that unpack archives
        response.stream = _limited_stream()(response.stream, longest)

    return {
        "headers": {"Accept-Encoding": "identity"},
        "follow_redirects": False,
        "trust_env": not in_own_network(url),
        "event_hooks": {"response": [limit]},
    }


@functools.cache
def _limited_stream() -> Any:
    """The class of a stream of bytes that ends with an error after too many of them."""

    class LimitedStream(http_library().AsyncByteStream):
        def __init__(self, stream: Any, longest: int) -> None:
            self._stream, self._longest = stream, longest

        async def __aiter__(self) -> AsyncIterator[bytes]:
            read = 0
            async for chunk in self._stream:
                read += len(chunk)
                if read > self._longest:
                    raise AnswerRejected(f"the answer is longer than {self._longest} bytes")
                yield chunk

        async def aclose(self) -> None:
            await self._stream.aclose()

    return LimitedStream


def parse_json(content: bytes) -> Any:
    """Parse the JSON of an answer. It may begin with a byte order mark.

    Raises:
        ValueError: it is empty, not UTF-8, no JSON, nested too deeply, or a mapping has a key twice.
    """
    if not content.strip():
        raise ValueError("the answer is empty")
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_mapping)
    except RecursionError:
        raise ValueError("the answer is nested too deeply") from None


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {one_line(twice, 40)!r} stands twice in the answer")
    return mapping


def finite_number(value: Any) -> float | None:
    """A number of JSON as a float; ``None`` if it is something else (true and false are), infinite, or too large."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int of any length
        return None
    return number if math.isfinite(number) else None


def without_surrogates(text: str) -> str:
    """A text that UTF-8 can write: JSON may hold halves of a surrogate pair, which no file and no request takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def clean_cause(text: str, key: str | None) -> str:
    """What a service said, for a message: in one line of at most `LONGEST_CAUSE` characters, without the key."""
    return one_line(text if key is None else text.replace(key, "***"), LONGEST_CAUSE)


def redirect_to(location: str | None) -> str:
    """Where a redirect leads, for a message."""
    if not location:
        return "a redirect without an address"
    return f"a redirect to {one_line(shown_address(location), LONGEST_CAUSE)}, which is not followed"


async def gather(coroutines: Iterable[Awaitable[T]]) -> list[T]:
    """Run coroutines at the same time and return all results. The first error, or an interruption, cancels them."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def bounded(slots: asyncio.Semaphore, call: Callable[[], Awaitable[T]]) -> T:
    """The result of a call that waits for a free slot before it begins."""
    async with slots:
        return await call()
