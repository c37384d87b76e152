"""An HTTP server on this machine that answers as a test says, for tests of what is asked over HTTP."""

from __future__ import annotations

import json
import math
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from online_dpo.types import Completion, Group, Prompt


@dataclass
class Answer:
    """What the server sends: after ``delay`` seconds, and with ``drip`` a byte of it every so many seconds.

    A ``body`` that is a function writes the whole answer, with its head, and then the connection is closed.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0


@dataclass
class Seen:
    """One request: its JSON, its headers by their names in lower case, and when it came."""

    body: dict[str, Any]
    headers: dict[str, str]
    time: float


class Endpoint:
    """``respond`` makes the answer to the n-th request (from 0)."""

    def __init__(self, respond: Callable[[dict[str, Any], int], Answer]) -> None:
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self.url = ""
        self._respond = respond
        self._running = 0
        self._lock = threading.Lock()

    def handle(self, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        with self._lock:
            number = len(self.seen)
            self.seen.append(Seen(body, headers, time.monotonic()))
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        try:
            answer = self._respond(body, number)
            time.sleep(answer.delay)
            return answer
        finally:
            with self._lock:
                self._running -= 1


@contextmanager
def serving(respond: Callable[[dict[str, Any], int], Answer], path: str = "/v1") -> Iterator[Endpoint]:
    endpoint = Endpoint(respond)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = endpoint.handle(body, {name.lower(): value for name, value in self.headers.items()})
            if callable(answer.body):
                self.close_connection = True
                with suppress(OSError):  # the client has given up
                    answer.body(self.wfile)
                return
            data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            try:
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                for piece in [data[i : i + 1] for i in range(len(data))] if answer.drip else [data]:
                    self.wfile.write(piece)
                    time.sleep(answer.drip)
            except OSError:  # the client has given up
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # connections that are opened at the same time

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that has gone

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}{path}"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving_bytes(send: Callable[[socket.socket], None]) -> Iterator[Endpoint]:
    """A server whose answers are no HTTP, or more than HTTP should be: ``send`` writes what it likes.

    ``seen`` of the endpoint stays empty but for its length: each request counts.
    """
    endpoint = Endpoint(lambda body, number: Answer())

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            reader = self.request.makefile("rb")
            head = b"".join(iter(reader.readline, b"\r\n")).lower()
            reader.read(int(head.partition(b"content-length:")[2].split()[0]))
            endpoint.seen.append(Seen({}, {}, time.monotonic()))
            with suppress(OSError):  # the client has given up
                send(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def says(text: str, p_first: float | None = None, usage: tuple[int, int] = (100, 1), **options: Any) -> Answer:
    """A chat completion. With ``p_first``, its last token has log-probabilities: A and B in that ratio make up 0.9."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if p_first is not None:
        likely = {"A": 0.9 * p_first, "B": 0.9 * (1 - p_first), "The": 0.1}
        top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in likely.items() if p > 0]
        tokens = [{"token": text[:-1], "logprob": -0.5, "bytes": None, "top_logprobs": []}] if text[:-1] else []
        tokens.append({"token": text[-1], "logprob": math.log(likely[text[-1]]), "bytes": None, "top_logprobs": top})
        choice["logprobs"] = {"content": tokens}
    return Answer(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)},
        },
        **options,
    )


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Answer:
    return Answer({"error": {"message": message, "code": code, "type": "x"}}, status, headers)


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two answers in a question that was made with one of the templates, in their order."""
    question = body["messages"][0]["content"]
    first, second = (
        re.search(rf"<<<ANSWER {letter}( \w+)?\n(.*?)\nANSWER {letter}\1?>>>", question, re.S) for letter in "AB"
    )
    assert first and second
    return first[2], second[2]


def comparison(first: str, second: str, prompt: Any = "Say something.", **columns: Any) -> Group:
    texts = (Completion((1,), (-1.0,), "stop", 0, text) for text in (first, second))
    return Group(Prompt(prompt, (1,), row=0, columns=columns), tuple(texts))


def comparisons(count: int) -> list[Group]:
    """Different ones; the second text is always the longer one."""
    return [comparison(f"{number}", f"{number} and more") for number in range(count)]
