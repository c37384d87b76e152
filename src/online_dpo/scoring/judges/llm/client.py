"""A client for an OpenAI-compatible endpoint. Questions that fail for a temporary reason are sent again."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from online_dpo.config.endpoints import read_key
from online_dpo.config.llm_judge import JudgeSettings
from online_dpo.errors import FeedbackStopped, error_text, one_line
from online_dpo.runs.often import OFTEN
from online_dpo.scoring.accounting import JudgeStatistics
from online_dpo.scoring.judges.llm.prompts import LONG_ANSWER, TokenChoice
from online_dpo.scoring.judges.llm.rate_limit import Budget, RateLimiter
from online_dpo.scoring.retries import BUSY, FIRST_PAUSE, LONGEST_PAUSE
from online_dpo.scoring.service import (
    LONGEST_ANSWER,
    AnswerRejected,
    clean_cause,
    client_options,
    finite_number,
    parse_json,
    redirect_to,
    without_surrogates,
)

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from tenacity import RetryCallState

logger = logging.getLogger(__name__)

REFUSED = (401, 402, 404)  # no key, no money, no such model: no question will be answered
NO_LOGPROBS = (400, 422)  # statuses of an endpoint that does not support log-probabilities
TOP_LOGPROBS = 20
BYTES_A_TOKEN = 1 << 13  # of an answer with the log-probabilities of its tokens, beside `LONGEST_ANSWER`
MOST_LOGPROB = 0.05  # what rounding may add to a probability of 1
MOST_TOKENS = 10**9  # a larger count of tokens is no count
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
                    OFTEN.tell(
                        "retry", "judge", f"A question to the judge failed: {cause}", attempt=state.attempt_number
                    )
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
            content = await self._request(self._body(question, max_tokens, temperature))
            reply = _read_reply(content, question, self._settings.base_url)
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
            "messages": [{"role": "user", "content": without_surrogates(question)}],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if self._asks_logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        body |= self._settings.extra or {}
        return {name: value for name, value in body.items() if value is not None}

    async def _request(self, body: dict[str, Any]) -> bytes:
        """Send a request and return the content of the answer."""
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
                return response.http_response.content
        except TimeoutError:
            raise _TemporaryFailure(
                f"no reply within `request_timeout`, {self._settings.request_timeout:g} s"
            ) from None
        except APIStatusError as error:
            raise self._status_error(error, asked_logprobs) from None
        except (APIConnectionError, AnswerRejected, OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, APIConnectionError) and error.__cause__ else error
            what = "" if isinstance(cause, AnswerRejected) else f"no connection to {self._settings.base_url}: "
            raise _TemporaryFailure(self._clean(what + error_text(cause))) from None

    def _status_error(self, error: APIStatusError, asked_logprobs: bool) -> Exception:
        """The exception for a response with an error status. Log-probabilities are switched off if not supported."""
        status = error.status_code
        if 300 <= status < 400:
            where = redirect_to(error.response.headers.get("location"))
            return FeedbackStopped(
                f"The judge's endpoint {self._settings.base_url} answers with {where}. Give the address that judges as "
                "`base_url`."
            )
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
        return clean_cause(text, None if self._client.api_key == NO_KEY else self._client.api_key)


def _client(settings: JudgeSettings) -> AsyncOpenAI:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    longest = LONGEST_ANSWER + BYTES_A_TOKEN * (settings.max_tokens or LONG_ANSWER)
    return AsyncOpenAI(
        api_key=read_key(settings.api_key_env) or NO_KEY,
        base_url=settings.base_url,
        max_retries=0,
        timeout=settings.request_timeout,
        http_client=DefaultAsyncHttpxClient(**client_options(settings.base_url, longest)),
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
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):  # no date, or none that the clock knows
            return None
    return seconds if seconds > 0 else None  # nan is not


def _read_reply(content: bytes, question: str, address: str) -> Reply:
    """Parse the content of a response. Token counts that it does not have are estimated from lengths.

    Raises:
        _TemporaryFailure: it is not a chat completion. Proxies send such answers while an endpoint starts or stops.
    """
    try:
        body = parse_json(content)
        choice = body["choices"][0]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError("the content of a message is a text")
        tokens = (choice.get("logprobs") or {}).get("content") or []
        usage = body.get("usage") or {}
        return Reply(
            without_surrogates(text),
            [_token_choice(token) for token in tokens],
            _count(usage.get("prompt_tokens"), len(question) // 4),
            _count(usage.get("completion_tokens"), len(text) // 4 + 1),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        shown = one_line(content[:1000].decode(errors="replace"), 80)
        raise _TemporaryFailure(f"no chat completion from {address}, but {shown!r}") from None


def _count(given: Any, estimate: int) -> int:
    """A number of tokens; the estimate if there is none, or something that is none."""
    is_count = isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= MOST_TOKENS
    return given if is_count else estimate


def _token_choice(token: dict[str, Any]) -> TokenChoice:
    """One token of an answer.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it has another form, or numbers that are no log-probabilities.
    """
    written, given = token["token"].encode("utf-8", "replace"), token.get("bytes")
    if not isinstance(given, list | None):
        raise TypeError("the bytes of a token are a list")  # `bytes(10**12)` would be a terabyte of zeros
    top = {other["token"]: _logprob(other["logprob"]) for other in token.get("top_logprobs") or []}
    return TokenChoice(written if given is None else bytes(given), {token["token"]: _logprob(token["logprob"]), **top})


def _logprob(value: Any) -> float:
    """A log-probability, which may be above 0 by rounding, and -inf.

    Raises:
        ValueError: the value is none.
    """
    number = -math.inf if value == -math.inf else finite_number(value)
    if number is None or number > MOST_LOGPROB:
        raise ValueError("no log-probability")
    return number
