"""Rewards from a service over HTTP."""

from __future__ import annotations

import asyncio
import datetime
import http.client
import importlib.util
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from online_dpo.config.llm_judge import in_own_network
from online_dpo.errors import FeedbackStopped, ScoringError, named_error
from online_dpo.scoring.accounting import FailureWindow
from online_dpo.scoring.protocols import describe, regroup
from online_dpo.scoring.retries import BUSY, FIRST_PAUSE, LONGEST_PAUSE
from online_dpo.types import Completion, Group, Prompt

if TYPE_CHECKING:
    from tenacity import Retrying

REFUSED = (401, 402, 404, 405)  # no key, no money, no such address or method: no completion will be scored
CHUNK_BYTES = 1 << 16


class _RequestFailed(Exception):
    """A batch got no scores. The message is the cause."""


class _TemporaryFailure(_RequestFailed):
    """A batch got no scores, for a cause that may pass."""


class HTTPReward:
    """A pointwise scorer that asks a service over HTTP.

    Each request posts JSON: ``{"prompts": [...], "completions": [...]}`` and a list for each of ``columns``, all of the
    same length. Prompts are texts or lists of messages; completions are texts. The response is ``{"scores": [...]}``
    with one number for each completion, or null where the service does not apply. Several requests run at the same
    time, and other scorers work meanwhile.

    Args:
        url: address of the service.
        name: name in metrics; by default the last part of the address.
        columns: columns of the dataset to send, with null for a prompt without that column. Dates and times, which
            Parquet files can contain, are sent as ISO text.
        batch_size: completions in one request.
        concurrency: requests at the same time.
        timeout: seconds that one request may take.
        attempts: most requests for one batch. Lost connections, time-outs, responses that are not JSON and the statuses
            408, 409, 429 and 500 or above are tried again, after a pause that doubles each time.
        max_failure_share: the run stops when more than this share of the last completions has no score.
        api_key_env: name of an environment variable with a key, which is sent as a bearer token.

    Raises:
        ValueError: ``url`` is not an address, ``columns`` names a field of the request, or the variable is not set.
        ScoringError: (when scoring) the response has the wrong form, or a value of a column cannot be written as JSON.
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
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"A reward's address begins with http:// or https://; {url!r} does not.")
        if reserved := {"prompts", "completions"} & set(columns):
            raise ValueError(f"`columns` holds {', '.join(sorted(reserved))}, which each request has already.")
        if importlib.util.find_spec("tenacity") is None:
            raise ValueError("A reward over HTTP needs tenacity: pip install 'online-dpo[judge]'")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(f"The environment variable {api_key_env}, named in `api_key_env`, is not set.")
        self.url = url
        self.name = name or url.rstrip("/").split("/")[-1]
        self.columns = tuple(columns)
        self.batch_size = batch_size
        self.concurrency = concurrency
        self.timeout = timeout
        self.attempts = attempts
        self.api_key_env = api_key_env
        self._failures = FailureWindow(f"Reward `{self.name}`", max_failure_share)
        # A proxy from the environment must not be used for a service in the user's own network.
        proxies = urllib.request.ProxyHandler({}) if in_own_network(url) else urllib.request.ProxyHandler()
        self._opener = urllib.request.build_opener(proxies)

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Return P x K scores, ``nan`` where the service failed. Each completion counts in the window of failures."""
        samples = [(group.prompt, completion) for group in groups for completion in group.completions]
        batches = [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="http-reward") as threads:
            results = list(threads.map(self._score_batch, batches))
        for batch, (_, cause) in zip(batches, results, strict=True):
            for _ in batch:
                self._failures.add(cause)
        return regroup([score for scores, _ in results for score in scores], groups)

    async def score_async(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Return the same as ``score``, which runs in another thread."""
        return await asyncio.to_thread(self.score, groups)

    def _score_batch(self, samples: list[tuple[Prompt, Completion]]) -> tuple[list[float | None], str | None]:
        """The scores of a batch, and the cause if they are missing."""
        body: dict[str, Any] = {
            "prompts": [prompt.content for prompt, _ in samples],
            "completions": [completion.text for _, completion in samples],
            **{column: [prompt.columns.get(column) for prompt, _ in samples] for column in self.columns},
        }
        try:
            response = self._retrying()(self._post, json.dumps(body, default=self._as_json).encode())
        except _RequestFailed as error:
            return [math.nan] * len(samples), str(error)
        return self._checked_scores(response, len(samples)), None

    def _retrying(self) -> Retrying:
        from tenacity import (
            Retrying,
            retry_if_exception_type,
            stop_after_attempt,
            wait_exponential,
            wait_random_exponential,
        )

        return Retrying(
            retry=retry_if_exception_type(_TemporaryFailure),
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential(FIRST_PAUSE, LONGEST_PAUSE) + wait_random_exponential(FIRST_PAUSE, LONGEST_PAUSE),
            reraise=True,
        )

    def _post(self, data: bytes) -> Any:
        """Send one request and return the parsed response."""
        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        end = time.monotonic() + self.timeout
        try:
            request = urllib.request.Request(self.url, data, headers)
            with self._opener.open(request, timeout=self.timeout) as response:
                content = _read_until(end, response)
            return json.loads(content)
        except urllib.error.HTTPError as error:
            cause = self._clean(f"status {error.code}: {error.read(2000).decode(errors='replace') or error.reason}")
            if error.code in REFUSED:
                raise FeedbackStopped(f"Reward `{self.name}` at {self.url} refuses to score: {cause}") from None
            is_temporary = error.code in BUSY or error.code >= 500
            raise (_TemporaryFailure if is_temporary else _RequestFailed)(cause) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _TemporaryFailure(self._clean(named_error(error))) from None

    def _as_json(self, value: Any) -> str:
        if isinstance(value, (datetime.date, datetime.time)):
            return value.isoformat()
        raise ScoringError(
            f"Reward `{self.name}` is to be sent {describe(value)}, which JSON does not have. Leave the column out of "
            "`columns`, or convert it in the dataset."
        )

    def _checked_scores(self, response: Any, expected: int) -> list[float | None]:
        scores = response.get("scores") if isinstance(response, dict) else None
        if not isinstance(scores, list):
            raise ScoringError(f'Reward `{self.name}` answered {describe(response)}; wanted: {{"scores": [...]}}.')
        if len(scores) != expected:
            raise ScoringError(f"Reward `{self.name}` answered {len(scores)} scores for {expected} completions.")
        for index, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, (int, float, type(None))):
                raise ScoringError(
                    f"Reward `{self.name}` answered {describe(score)} at index {index}; wanted: a number."
                )
        return [None if score is None else float(score) for score in scores]

    def _clean(self, text: str) -> str:
        """A cause in one line of at most 300 characters, with the key hidden."""
        if self.api_key_env is not None:
            text = text.replace(os.environ[self.api_key_env], "***")
        return " ".join(text.split())[:300]


def _read_until(end: float, response: http.client.HTTPResponse) -> bytes:
    """Reads a response to its end.

    Raises:
        TimeoutError: it had not come by ``end``.
    """
    content = b""
    # The socket's own time-out starts again with each chunk, so the total is measured here.
    while chunk := response.read1(CHUNK_BYTES):
        content += chunk
        if time.monotonic() > end:
            raise TimeoutError("the answer arrives too slowly")
    return content
