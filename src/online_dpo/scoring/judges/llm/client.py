"""Questions to an OpenAI-compatible endpoint, repeated while they fail for a reason that may pass."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from online_dpo.config.llm_judge import JudgeSettings
from online_dpo.errors import FeedbackStopped, error_text
from online_dpo.scoring.accounting import Tally
from online_dpo.scoring.judges.llm.prompts import TokenChoice
from online_dpo.scoring.judges.llm.rate_limit import Budget, RateLimiter

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from tenacity import RetryCallState

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds between two attempts; doubled each time, and as much again by chance
BUSY = (408, 409, 429)  # the statuses below 500 that ask to come again
REFUSED = (401, 402, 404)  # no key, no money, no such model: no question will be answered
NO_LOGPROBS = (400, 422)
TOP_LOGPROBS = 20
LONGEST_CAUSE = 300  # characters
NO_KEY = "none"  # what an endpoint without keys is sent


@dataclass(frozen=True)
class Reply:
    """>>> Reply("A", [TokenChoice(b"A", {"A": -0.1, "B": -2.4})], input_tokens=212, output_tokens=1)"""

    text: str
    choices: list[TokenChoice]
    input_tokens: int
    output_tokens: int


class QuestionFailed(Exception):
    """One question has no reply. The message is the last cause."""


class _Again(QuestionFailed):
    """A cause that may pass: after ``pause`` seconds at least, or at once if it is 0."""

    def __init__(self, cause: str, pause: float | None = None) -> None:
        super().__init__(cause)
        self.pause = pause


class ChatEndpoint:
    """An endpoint as its settings describe it. Used within one event loop.

    The API key is read from the environment here, and shows in no message, even if the endpoint repeats it.

    Args:
        limiter, budget: what all questions share.
        tally: counts requests, tokens and cost.
    """

    def __init__(self, settings: JudgeSettings, limiter: RateLimiter, budget: Budget, tally: Tally) -> None:
        self._settings = settings
        self._limiter = limiter
        self._budget = budget
        self._tally = tally
        self.slots = asyncio.Semaphore(settings.concurrency)
        self._asks_logprobs = settings.logprobs
        self._was_in_trouble = False
        self._client = _client(settings)

    async def ask(self, question: str, max_tokens: int, temperature: float) -> Reply:
        """One question; the caller holds one of ``slots`` meanwhile.

        Raises:
            QuestionFailed: it has no reply in time, or the endpoint does not take it.
            FeedbackStopped: no question will have one, or the money is spent.
        """
        from tenacity import AsyncRetrying, retry_if_exception_type

        cause = "none"
        try:
            async with asyncio.timeout(self._settings.question_timeout) as limit:

                def stop(state: RetryCallState) -> bool:
                    nonlocal cause
                    cause = str(state.outcome.exception()) if state.outcome else cause
                    self._say_once(cause)
                    end = limit.when()
                    assert end is not None
                    too_late = asyncio.get_running_loop().time() + state.upcoming_sleep >= end
                    return too_late or state.attempt_number >= self._settings.attempts

                retrying = AsyncRetrying(
                    retry=retry_if_exception_type(_Again), stop=stop, wait=_pause, sleep=asyncio.sleep, reraise=True
                )
                return await retrying(self._attempt, question, max_tokens, temperature, limit)
        except TimeoutError:
            text = f"no reply within `question_timeout`, {self._settings.question_timeout:g} s (before: {cause})"
            raise QuestionFailed(text) from None

    def _say_once(self, trouble: str) -> None:
        """Before many attempts and their pauses have passed in silence."""
        if not self._was_in_trouble:
            self._was_in_trouble = True
            attempts = self._settings.attempts
            logger.warning("The judge's endpoint is in trouble: %s. Questions are tried %d times.", trouble, attempts)

    async def _attempt(self, question: str, max_tokens: int, temperature: float, limit: asyncio.Timeout) -> Reply:
        guess = len(question) // 3 + 16
        async with AsyncExitStack() as stack:
            with _stopped(limit):
                await stack.enter_async_context(self._budget.reserve(self._settings.cost(guess, max_tokens)))
                entry = await self._limiter.acquire(guess + max_tokens)
            text = await self._request(self._body(question, max_tokens, temperature))
            reply = _read_reply(text, question, self._settings.base_url)
            entry.tokens = reply.input_tokens + reply.output_tokens
            cost = self._settings.cost(reply.input_tokens, reply.output_tokens)
            self._budget.spent += cost
        self._tally.add("input_tokens", reply.input_tokens)
        self._tally.add("output_tokens", reply.output_tokens)
        self._tally.add("cost", cost)
        return reply

    def _body(self, question: str, max_tokens: int, temperature: float) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if self._asks_logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        body |= self._settings.extra or {}
        return {name: value for name, value in body.items() if value is not None}

    async def _request(self, body: dict[str, Any]) -> str:
        from openai import APIConnectionError, APIStatusError

        asked_logprobs = "logprobs" in body
        self._tally.add("requests")
        try:
            # The client's own time-out starts anew with each piece that arrives.
            async with asyncio.timeout(self._settings.request_timeout):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=body.pop("model"), messages=body.pop("messages"), extra_body=body
                )
                # As it came: parsed by the client, any JSON is a reply, and any text as well.
                return response.http_response.text
        except TimeoutError:
            raise _Again(f"no reply within `request_timeout`, {self._settings.request_timeout:g} s") from None
        except APIStatusError as error:
            raise self._refusal(error, asked_logprobs) from None
        except APIConnectionError as error:
            cause = f"no connection to {self._settings.base_url}: {error_text(error.__cause__ or error)}"
            raise _Again(self._clean(cause)) from None

    def _refusal(self, error: APIStatusError, asked_logprobs: bool) -> Exception:
        status = error.status_code
        cause = self._clean(f"status {status}: {error.message}")
        if status in NO_LOGPROBS and asked_logprobs and "logprobs" in error.message:
            if self._asks_logprobs:
                logger.warning("The judge's endpoint gives no log-probabilities, so its answers are votes: %s", cause)
            self._asks_logprobs = False
            return _Again(cause, pause=0.0)
        if status in REFUSED or error.code == "insufficient_quota":
            where = f"{self._settings.model} at {self._settings.base_url}"
            return FeedbackStopped(f"The endpoint refuses to judge ({where}): {cause}")
        if status in BUSY or status >= 500:
            return _Again(cause, _retry_after(error.response.headers.get("retry-after")))
        return QuestionFailed(cause)

    def _clean(self, text: str) -> str:
        """A cause in one line, without the key."""
        if self._client.api_key != NO_KEY:
            text = text.replace(self._client.api_key, "***")
        return " ".join(text.split())[:LONGEST_CAUSE]


def _client(settings: JudgeSettings) -> AsyncOpenAI:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    return AsyncOpenAI(
        api_key=os.environ.get(settings.api_key_env) or NO_KEY,
        base_url=settings.base_url,
        max_retries=0,
        timeout=settings.request_timeout,
        # Proxies from the environment are for others than those in one's own network.
        http_client=DefaultAsyncHttpxClient(trust_env=not settings.is_local),
    )


@contextmanager
def _stopped(limit: asyncio.Timeout) -> Iterator[None]:
    """The clock of a question stands still inside."""
    loop, end = asyncio.get_running_loop(), limit.when()
    assert end is not None
    since = loop.time()
    limit.reschedule(None)
    try:
        yield
    finally:
        limit.reschedule(end + loop.time() - since)


def _pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: what the endpoint asks for, or longer each time, by chance up to twice."""
    from tenacity import wait_exponential, wait_random_exponential

    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, _Again)
    if error.pause == 0:
        return 0.0
    usual = wait_exponential(FIRST_PAUSE, LONGEST_PAUSE)(state)
    by_chance = wait_random_exponential(FIRST_PAUSE, LONGEST_PAUSE)(state)
    return max(error.pause or 0.0, usual) + by_chance


def _retry_after(header: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for; it holds a number, or a date."""
    if header is None:
        return None
    try:
        return max(float(header), 0.0) or None
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(header).timestamp() - time.time(), 0.0) or None
    except ValueError:
        return None


def _read_reply(text: str, question: str, address: str) -> Reply:
    """
    Raises:
        _Again: the text is no chat completion. Proxies send such when an endpoint is about to go down or come up.
    """
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        content = choice["message"]["content"] or ""
        listed = (choice.get("logprobs") or {}).get("content") or []
        choices = [_token_choice(token) for token in listed]
        usage = body.get("usage") or {}
        sizes = usage.get("prompt_tokens", len(question) // 4), usage.get("completion_tokens", len(content) // 4 + 1)
        return Reply(content, choices, int(sizes[0]), int(sizes[1]))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Again(f"no chat completion from {address}, but {' '.join(text.split())[:80]!r}") from None


def _token_choice(token: dict[str, Any]) -> TokenChoice:
    written = bytes(token["bytes"]) if token.get("bytes") is not None else token["token"].encode()
    likely = {other["token"]: float(other["logprob"]) for other in token.get("top_logprobs") or []}
    return TokenChoice(written, {token["token"]: float(token["logprob"]), **likely})
