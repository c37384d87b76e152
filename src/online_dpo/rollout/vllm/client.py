"""HTTP calls to one vLLM server, with retries for errors that may be temporary."""

from __future__ import annotations

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from online_dpo.config.endpoints import read_key
from online_dpo.distributed.waiting import waiting_for
from online_dpo.errors import RolloutServerError, error_text, named_error
from online_dpo.rollout.vllm.key import VARIABLE
from online_dpo.runs.often import OFTEN

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between two attempts; doubled each time
BUSY = (408, 429)  # statuses below 500 that ask the client to try again
WORKER_RAISED = re.compile(r"Call to \w+ method failed")  # a status of 500 that would come again
PLAIN_TEXT = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # these answer with text that is not JSON
LONGEST_ANSWER = 256 << 20  # bytes; a completion of 100,000 tokens has about 20 million
TAKES_NO_WEIGHTS = " Weights can only be sent to a server that was started with `online-dpo serve`."
WRONG_KEY = f" Set {VARIABLE} to the key with which the server was started."
REDIRECTS = " It sends to another address, which is not followed: give that one, if it is the server's."

# Rollout servers are in the same network, so proxies that the environment sets must not be used for them.


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the server's key and our weights are for the address that was given."""

    def redirect_request(self, *args: Any) -> None:
        return None


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


class _ErrorStatus(Exception):
    """An HTTP answer with an error status."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text.strip())
        self.code = code


class _AnswerTooLong(Exception):
    """An answer that no vLLM server gives."""


def _read(response: http.client.HTTPResponse, until: float) -> bytes:
    """Reads an answer.

    Raises:
        TimeoutError: it is not complete at this time, although bytes of it come. The connection's own time limit is for
            a pause between two of them.
        _AnswerTooLong: it has more than `LONGEST_ANSWER` bytes.
    """
    pieces, size = [], 0
    while piece := response.read1(1 << 20):
        pieces.append(piece)
        size += len(piece)
        if size > LONGEST_ANSWER:
            raise _AnswerTooLong(f"the answer has more than {LONGEST_ANSWER >> 20} MiB")
        if time.monotonic() > until:
            raise TimeoutError("the answer takes too long to arrive")
    return b"".join(pieces)


class VLLMClient:
    """A client of one vLLM server.

    Args:
        url: the server's address, such as ``http://localhost:8000``.
        timeout: seconds that one answer may take, and for which a failing call is retried.

    Raises:
        ValueError: ``url`` is not an HTTP address.
    """

    def __init__(self, url: str, timeout: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"A vLLM server's address begins with http:// or https://; {url!r} does not.")
        self.url = url.rstrip("/")
        self.timeout = timeout

    def call(
        self, path: str, body: dict[str, Any] | None = None, read: Callable[[Any], T] = lambda answer: answer
    ) -> T:
        """Sends a GET request, or a POST request with ``body``; returns ``read(answer)`` for the JSON of the answer.

        Lost connections, timeouts, statuses of 500 and above, and answers for which ``read`` raises a RuntimeError are
        retried until the server has failed for ``timeout`` seconds.

        Raises:
            RolloutServerError: the server kept failing, or refused the request.
        """
        return self.keep_trying(path, lambda: read(self.once(path, body)))

    def keep_trying(self, path: str, attempt: Callable[[], T]) -> T:
        """Calls ``attempt`` until it succeeds, and returns its result; retries as `call` does.

        Args:
            path: what the attempt requests, for messages.
            attempt: makes one or more requests with `once`.

        Raises:
            RolloutServerError: it kept failing, or the server refused a request.
        """
        with waiting_for(f"vLLM server {self.url}"):
            return self._keep_trying(path, attempt)

    def _keep_trying(self, path: str, attempt: Callable[[], T]) -> T:
        failing_since = math.inf
        pause = FIRST_PAUSE
        while True:
            try:
                return attempt()
            except _ErrorStatus as error:
                cause = str(error)
                if (error.code < 500 and error.code not in BUSY) or WORKER_RAISED.search(cause):
                    raise RolloutServerError(f"{self.url}{path} failed: {cause}.{_hint(error)}") from error
            except (_AnswerTooLong, RecursionError) as error:  # the latter from JSON that is nested too deeply
                cause = error_text(error)
                raise RolloutServerError(f"{self.url}{path} failed: {cause}. Is this a vLLM server?") from error
            except (OSError, http.client.HTTPException, json.JSONDecodeError, RuntimeError) as error:
                cause = named_error(error)
            now = time.monotonic()
            failing_since = min(failing_since, now)
            if now + pause - failing_since > self.timeout:
                raise RolloutServerError(
                    f"{self.url}{path} has failed for {self.timeout:g} seconds; last cause: {cause}. Start the server "
                    "with `online-dpo serve`, or raise `vllm_server_timeout` if it needs longer."
                )
            OFTEN.tell("retry", self.url, f"{self.url}{path} failed and is asked again: {cause}", seconds=pause)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def rpc(self, method: str, *args: str) -> list[Any]:
        """Calls a method of `worker.WeightUpdates` in each worker; returns the answers, one for each worker."""
        answer = self.call("/collective_rpc", {"method": method, "args": list(args)})
        return answer["results"]

    def once(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Makes one request, without retries; returns the JSON of the answer, or ``None``. For `keep_trying`."""
        data = None if body is None else json.dumps(body).encode()
        key = read_key(VARIABLE)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            until = time.monotonic() + self.timeout
            with _opener.open(request, timeout=self.timeout) as response:
                answer = _read(response, until)
        except urllib.error.HTTPError as error:
            raise _ErrorStatus(
                error.code, f"{error.code} {error.reason} {error.read(2000).decode(errors='replace')}"
            ) from error
        return json.loads(answer) if answer and path not in PLAIN_TEXT else None


def _hint(error: _ErrorStatus) -> str:
    """What to do about an error status."""
    if error.code in (401, 403):
        return WRONG_KEY
    if 300 <= error.code < 400:
        return REDIRECTS
    return TAKES_NO_WEIGHTS if error.code == 404 or "is not implemented" in str(error) else ""
