"""Rewards from a service over HTTP."""

from __future__ import annotations

import asyncio
import datetime
import importlib.util
import json
import math
import ssl
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from online_dpo.config.endpoints import check_address, check_variable, read_key, shown_address, shown_variable
from online_dpo.errors import FeedbackStopped, ScoringError, error_text, named_error
from online_dpo.runs.often import OFTEN
from online_dpo.scoring.accounting import FailureWindow
from online_dpo.scoring.event_loop import submit, wait_for
from online_dpo.scoring.protocols import describe, regroup
from online_dpo.scoring.retries import BUSY, FIRST_PAUSE, LONGEST_PAUSE
from online_dpo.scoring.service import (
    LONGEST_ANSWER,
    AnswerRejected,
    bounded,
    clean_cause,
    client_options,
    finite_number,
    gather,
    http_library,
    parse_json,
    redirect_to,
)
from online_dpo.types import Completion, Group, Prompt

if TYPE_CHECKING:
    from tenacity import AsyncRetrying, RetryCallState

WHERE_KEYS_GO = "Put the key into an environment variable and name that in `api_key_env`: it is sent in a header."
REFUSED = (401, 402, 404, 405)  # no key, no money, no such address or method: no completion will be scored
BYTES_A_SCORE = 1 << 10
"""Bytes of an answer for each completion, beside `LONGEST_ANSWER`."""

Score = tuple[float | None, str | None]
"""A score, and the cause if it is missing."""


class _RequestFailed(Exception):
    """A batch got no scores. The message is the cause."""


class _TemporaryFailure(_RequestFailed):
    """A batch got no scores, for a cause that may pass."""


class HTTPReward:
    """A pointwise scorer that asks a service over HTTP.

    Each request posts JSON: ``{"prompts": [...], "completions": [...]}`` and a list for each of ``columns``, all of the
    same length. Prompts are texts or lists of messages; completions are texts. The response is ``{"scores": [...]}``
    with one number for each completion, or null where the service does not apply. Several requests run at the same
    time, and other scorers work meanwhile. Redirects are not followed.

    Args:
        url: address of the service, without a key in it.
        name: name in metrics; by default the last part of the address.
        columns: columns of the dataset to send, with null for a prompt without that column. Dates and times, which
            Parquet files can contain, are sent as ISO text.
        batch_size: completions in one request.
        concurrency: requests at the same time.
        timeout: seconds that one request may take, from its beginning to the last byte of the answer.
        attempts: most requests for one batch. Lost connections, time-outs, answers that are not JSON or are too long,
            and the statuses 408, 409, 429 and 500 or above are tried again, after a pause that doubles each time.
        max_failure_share: the run stops when more than this share of the last completions has no score. That includes
            answers of another form, and scores that are no finite numbers.
        api_key_env: name of an environment variable with a key, which is sent as a bearer token.

    Raises:
        ValueError: ``url`` is not an address or holds a key, ``columns`` names a field of the request, or the variable
            is not set.
        ScoringError: (when scoring) a value of a column cannot be written as JSON.
        FeedbackStopped: (when scoring) the service refuses the key, does not exist at this address, or fails too often.
    """

    is_async = True

    def __init__(
        self,
        url: str,
        name: str | None = None,
        *,
        columns: Sequence[str] = (),
        batch_size: int = 64,
        concurrency: int = 8,
        timeout: float = 60.0,
        attempts: int = 6,
        max_failure_share: float = 0.2,
        api_key_env: str | None = None,
    ) -> None:
        where_keys_go = (
            "Put the key into an environment variable and name that in `api_key_env`; it is sent in a header."
        )
        parts = check_address(url, "A reward's address", where_keys_go)
        if reserved := {"prompts", "completions"} & set(columns):
            raise ValueError(f"`columns` holds {', '.join(sorted(reserved))}, which each request has already.")
        if any(importlib.util.find_spec(package) is None for package in ("openai", "tenacity")):
            raise ValueError("A reward over HTTP needs openai and tenacity: pip install 'online-dpo[judge]'")
        for field, value, is_right in (
            ("batch_size", batch_size, batch_size >= 1),
            ("concurrency", concurrency, concurrency >= 1),
            ("attempts", attempts, attempts >= 1),
            ("timeout", timeout, 0 < timeout < math.inf),
            ("max_failure_share", max_failure_share, 0 <= max_failure_share <= 1),
        ):
            if not is_right:
                wanted = "between 0 and 1" if field == "max_failure_share" else "above 0"
                raise ValueError(f"`{field}` of an HTTPReward must be {wanted}; it is {value}.")
        self.url = url
        self.name = name or parts.path.rstrip("/").rpartition("/")[2] or str(parts.hostname)
        self.columns = tuple(columns)
        self.batch_size = batch_size
        self.concurrency = concurrency
        self.timeout = timeout
        self.attempts = attempts
        self.api_key_env = api_key_env
        self._key()
        self.counts_failures = True
        self._failures = FailureWindow(f"Reward `{self.name}`", max_failure_share)

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Return P x K scores, ``nan`` where the service failed. Each completion counts in the window of failures."""
        return wait_for(submit(self.score_async(groups)))

    async def score_async(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Return the same as ``score``."""
        samples = [(group.prompt, completion) for group in groups for completion in group.completions]
        batches = [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]
        slots = asyncio.Semaphore(self.concurrency)
        async with self._client() as client:
            results = await gather(bounded(slots, partial(self._score_batch, client, batch)) for batch in batches)
        scores = [score for batch in results for score in batch]
        for _, cause in scores:
            self._failures.add(cause)
        return regroup([score for score, _ in scores], groups)

    def _client(self) -> Any:
        library = http_library()
        return library.AsyncClient(
            **client_options(self.url, LONGEST_ANSWER + BYTES_A_SCORE * self.batch_size),
            verify=ssl.create_default_context() if self.url.startswith("https") else False,
            timeout=self.timeout,
            limits=library.Limits(max_connections=None),
        )

    async def _score_batch(self, client: Any, samples: list[tuple[Prompt, Completion]]) -> list[Score]:
        body: dict[str, Any] = {
            "prompts": [prompt.content for prompt, _ in samples],
            "completions": [completion.text for _, completion in samples],
            **{column: [prompt.columns.get(column) for prompt, _ in samples] for column in self.columns},
        }
        data = json.dumps(body, default=self._as_json).encode()
        try:
            return self._read_scores(await self._retrying()(self._post, client, data), len(samples))
        except _RequestFailed as error:
            return [(math.nan, str(error))] * len(samples)

    def _retrying(self) -> AsyncRetrying:
        from tenacity import (
            AsyncRetrying,
            retry_if_exception_type,
            stop_after_attempt,
            wait_exponential,
            wait_random_exponential,
        )

        return AsyncRetrying(
            retry=retry_if_exception_type(_TemporaryFailure),
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential(FIRST_PAUSE, LONGEST_PAUSE) + wait_random_exponential(FIRST_PAUSE, LONGEST_PAUSE),
            sleep=asyncio.sleep,
            before_sleep=self._tell_retry,
            reraise=True,
        )

    def _tell_retry(self, state: RetryCallState) -> None:
        error = None if state.outcome is None else state.outcome.exception()
        cause = "no answer" if error is None else error_text(error)
        text = f"A request to reward `{self.name}` failed and is sent again: {cause}"
        OFTEN.tell("retry", self.name, text, attempt=state.attempt_number)

    async def _post(self, client: Any, data: bytes) -> Any:
        """Send one request and return the parsed answer."""
        key, library = self._key(), http_library()
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        try:
            # The client's own time-out starts again with each piece of the answer.
            async with asyncio.timeout(self.timeout):
                response = await client.post(self.url, content=data, headers=headers)
        except TimeoutError:
            raise _TemporaryFailure(f"no whole answer within `timeout`, {self.timeout:g} s") from None
        except AnswerRejected as error:
            raise _TemporaryFailure(str(error)) from None
        except (library.HTTPError, library.InvalidURL, OSError, ValueError) as error:
            raise _TemporaryFailure(clean_cause(named_error(error), key)) from None
        if not response.is_success:
            raise self._status_error(response, key)
        try:
            return parse_json(response.content)
        except ValueError as error:
            raise _TemporaryFailure(clean_cause(f"no JSON: {error}", key)) from None

    def _status_error(self, response: Any, key: str | None) -> Exception:
        """The exception for an answer with another status than that of success."""
        status, who = response.status_code, f"Reward `{self.name}` at {shown_address(self.url)}"
        if 300 <= status < 400:
            where = redirect_to(response.headers.get("location"))
            return FeedbackStopped(f"{who} answers with {where}. Give the address that scores.")
        cause = clean_cause(f"status {status}: {response.text or response.reason_phrase}", key)
        if status in REFUSED:
            return FeedbackStopped(f"{who} refuses to score: {cause}")
        return (_TemporaryFailure if status in BUSY or status >= 500 else _RequestFailed)(cause)

    def _as_json(self, value: Any) -> str:
        if isinstance(value, (datetime.date, datetime.time)):
            return value.isoformat()
        raise ScoringError(
            f"Reward `{self.name}` is to be sent {describe(value)}, which JSON does not have. Leave the column out of "
            "`columns`, or convert it in the dataset."
        )

    def _read_scores(self, answer: Any, expected: int) -> list[Score]:
        """The scores in an answer. What is no finite number is missing, and so is a whole answer of another form."""
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise _RequestFailed(f'the answer is {describe(answer)}; wanted: {{"scores": [...]}}')
        if len(scores) != expected:
            raise _RequestFailed(f"the answer has {len(scores)} scores for {expected} completions")
        return [_checked(index, score) for index, score in enumerate(scores)]

    def _key(self) -> str | None:
        """The key, read anew each time, so that it stands in no attribute."""
        if self.api_key_env is None:
            return None
        check_variable(self.api_key_env, "api_key_env")
        key = read_key(self.api_key_env)
        if key is None:
            raise ValueError(f"`api_key_env`: {shown_variable(self.api_key_env)} is not set.")
        return key


def _checked(index: int, score: Any) -> Score:
    """One score of an answer. ``None`` stays: the service does not apply."""
    number = finite_number(score)
    if score is None or number is not None:
        return number, None
    return math.nan, f"the score at index {index} is {describe(score)}; wanted: a finite number"
