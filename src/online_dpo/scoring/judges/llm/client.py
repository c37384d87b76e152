"""A client for an OpenAI-compatible endpoint. Questions that fail for a temporary reason are sent again."""

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
from online_dpo.scoring.accounting import JudgeStatistics
from online_dpo.scoring.judges.llm.prompts import TokenChoice
from online_dpo.scoring.judges.llm.rate_limit import Budget, RateLimiter
from online_dpo.scoring.retries import BUSY, FIRST_PAUSE, LONGEST_PAUSE

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from tenacity import RetryCallState

logger = logging.getLogger(__name__)

REFUSED = (401, 402, 404)  # no key, no money, no such model: no question will be answered
NO_LOGPROBS = (400, 422)  # statuses of an endpoint that does not support log-probabilities
TOP_LOGPROBS = 20
LONGEST_CAUSE = 300  # characters
NO_KEY = "none"  # sent to an endpoint that needs no key


@dataclass(frozen=True)
class Reply:
    """A model's reply to one question. ``choices`` are its tokens with log-probabilities, empty if there are none.

    >>> Reply("A", [TokenChoice(b"A", {"A": -0.1, "B": -2.4})], input_tokens=212, output_tokens=1)
    """

    text: str
    choices: list[TokenChoice]
    input_tokens: int
    output_tokens: int


class QuestionFailed(Exception):
    """A question got no reply. The message is the last cause."""


class _TemporaryFailure(QuestionFailed):
    """An attempt failed for a temporary reason. The next may start after ``pause`` seconds, or at once if it is 0."""

    def __init__(self, cause: str, pause: float | None = None) -> None:
        super().__init__(cause)
        self.pause = pause


class ChatEndpoint:
    """An OpenAI-compatible chat endpoint with a judge's settings. Used within one event loop.

    The API key is read from the environment here. It is removed from all messages, even if the endpoint repeats it.

    Args:
        limiter, budget: the limits that all questions share.
        statistics: counts requests, tokens and cost.
    """

    def __init__(
        self, settings: JudgeSettings, limiter: RateLimiter, budget: Budget, statistics: JudgeStatistics
    ) -> None:
        self._settings = settings
        self._limiter = limiter
        self._budget = budget
        self._statistics = statistics
        self.slots = asyncio.Semaphore(settings.concurrency)
        self._asks_logprobs = settings.logprobs
        self._has_warned = False
        self._client = _client(settings)

    async def ask(self, question: str, max_tokens: int, temperature: float) -> Reply:
        """Ask one question. The caller holds one of ``slots`` meanwhile.

        Raises:
            QuestionFailed: there was no reply in time, or the endpoint rejected the question.
            FeedbackStopped: the endpoint will answer no question, or the budget is spent.
        """
        from tenacity import AsyncRetrying, retry_if_exception_type

        cause = "none"
        try:
            async with asyncio.timeout(self._settings.question_timeout) as limit:

                def stop(state: RetryCallState) -> bool:
                    nonlocal cause
                    cause = str(state.outcome.exception()) if state.outcome else cause
                    self._warn_once(cause)
                    end = limit.when()
                    assert end is not None
                    too_late = asyncio.get_running_loop().time() + state.upcoming_sleep >= end
                    return too_late or state.attempt_number >= self._settings.attempts

                retrying = AsyncRetrying(
                    retry=retry_if_exception_type(_TemporaryFailure),
                    stop=stop,
                    wait=_pause,
                    sleep=asyncio.sleep,
                    reraise=True,
                )
                return await retrying(self._attempt, question, max_tokens, temperature, limit)
        except TimeoutError:
            text = f"no reply within `question_timeout`, {self._settings.question_timeout:g} s (before: {cause})"
            raise QuestionFailed(text) from None

    def _warn_once(self, cause: str) -> None:
        """Warn at the first failure, since all attempts and their pauses can take minutes."""
        if not self._has_warned:
            self._has_warned = True
            attempts = self._settings.attempts
            logger.warning("The judge's endpoint is in trouble: %s. Questions are tried %d times.", cause, attempts)

    async def _attempt(self, question: str, max_tokens: int, temperature: float, limit: asyncio.Timeout) -> Reply:
        """Send the question once, within the shared limits, and count its tokens and cost."""
        input_estimate = len(question) // 3 + 16
        async with AsyncExitStack() as stack:
            with _suspended(limit):
                await stack.enter_async_context(self._budget.reserve(self._settings.cost(input_estimate, max_tokens)))
                entry = await self._limiter.acquire(input_estimate + max_tokens)
            text = await self._request(self._body(question, max_tokens, temperature))
            reply = _read_reply(text, question, self._settings.base_url)
            entry.tokens = reply.input_tokens + reply.output_tokens
            cost = self._settings.cost(reply.input_tokens, reply.output_tokens)
            self._budget.spent += cost
        self._statistics.add("input_tokens", reply.input_tokens)
        self._statistics.add("output_tokens", reply.output_tokens)
        self._statistics.add("cost", cost)
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
        """Send a request and return the text of the response."""
        from openai import APIConnectionError, APIStatusError

        asked_logprobs = "logprobs" in body
        self._statistics.add("requests")
        try:
            # The client's own time-out starts again with each piece of the response.
            async with asyncio.timeout(self._settings.request_timeout):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=body.pop("model"), messages=body.pop("messages"), extra_body=body
                )
                # Not parsed by the client, which would accept any JSON, and any text, as a reply.
                return response.http_response.text
        except TimeoutError:
            raise _TemporaryFailure(
                f"no reply within `request_timeout`, {self._settings.request_timeout:g} s"
            ) from None
        except APIStatusError as error:
            raise self._status_error(error, asked_logprobs) from None
        except APIConnectionError as error:
            cause = f"no connection to {self._settings.base_url}: {error_text(error.__cause__ or error)}"
            raise _TemporaryFailure(self._clean(cause)) from None

    def _status_error(self, error: APIStatusError, asked_logprobs: bool) -> Exception:
        """The exception for a response with an error status. Log-probabilities are switched off if not supported."""
        status = error.status_code
        cause = self._clean(f"status {status}: {error.message}")
        if status in NO_LOGPROBS and asked_logprobs and "logprobs" in error.message:
            if self._asks_logprobs:
                logger.warning("The judge's endpoint gives no log-probabilities, so its answers are votes: %s", cause)
            self._asks_logprobs = False
            return _TemporaryFailure(cause, pause=0.0)
        if status in REFUSED or error.code == "insufficient_quota":
            where = f"{self._settings.model} at {self._settings.base_url}"
            return FeedbackStopped(f"The endpoint refuses to judge ({where}): {cause}")
        if status in BUSY or status >= 500:
            return _TemporaryFailure(cause, _retry_after(error.response.headers.get("retry-after")))
        return QuestionFailed(cause)

    def _clean(self, text: str) -> str:
        """A cause in one line of at most `LONGEST_CAUSE` characters, with the key hidden."""
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
        # A proxy from the environment must not be used for an endpoint in the user's own network.
        http_client=DefaultAsyncHttpxClient(trust_env=not settings.is_local),
    )


@contextmanager
def _suspended(limit: asyncio.Timeout) -> Iterator[None]:
    """Suspend a time-out inside this context: waiting for the shared limits does not count as a question's time."""
    loop, end = asyncio.get_running_loop(), limit.when()
    assert end is not None
    start = loop.time()
    limit.reschedule(None)
    try:
        yield
    finally:
        limit.reschedule(end + loop.time() - start)


def _pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: what the endpoint asks for, or twice the last pause, plus a random part."""
    from tenacity import wait_exponential, wait_random_exponential

    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, _TemporaryFailure)
    if error.pause == 0:
        return 0.0
    exponential = wait_exponential(FIRST_PAUSE, LONGEST_PAUSE)(state)
    random_part = wait_random_exponential(FIRST_PAUSE, LONGEST_PAUSE)(state)
    return max(error.pause or 0.0, exponential) + random_part


def _retry_after(header: str | None) -> float | None:
    """The seconds that a ``Retry-After`` header asks for. It contains a number of seconds or a date."""
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
    """Parse the text of a response. Token counts that it does not have are estimated from lengths.

    Raises:
        _TemporaryFailure: the text is not a chat completion. Proxies send such texts while an endpoint starts or stops.
    """
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        content = choice["message"]["content"] or ""
        tokens = (choice.get("logprobs") or {}).get("content") or []
        choices = [_token_choice(token) for token in tokens]
        usage = body.get("usage") or {}
        input_tokens = usage.get("prompt_tokens", len(question) // 4)
        output_tokens = usage.get("completion_tokens", len(content) // 4 + 1)
        return Reply(content, choices, int(input_tokens), int(output_tokens))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _TemporaryFailure(f"no chat completion from {address}, but {' '.join(text.split())[:80]!r}") from None


def _token_choice(token: dict[str, Any]) -> TokenChoice:
    content = bytes(token["bytes"]) if token.get("bytes") is not None else token["token"].encode()
    top = {other["token"]: float(other["logprob"]) for other in token.get("top_logprobs") or []}
    return TokenChoice(content, {token["token"]: float(token["logprob"]), **top})
