"""What a service beside a run answers, for the faults of rewards and judges over HTTP."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from typing import Any

from faults.harness import SECRET
from support.endpoint import Answer, error, says, shown

Respond = Callable[[dict[str, Any], int], Answer]
KEY = {"SERVICE_KEY": SECRET}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"


def score_of(text: str) -> float:
    """The score that the reward function of a run without a fault gives."""
    return sum(map(ord, text)) % 101 / 101


def scores(body: dict[str, Any], number: int) -> Answer:
    """The right answer to a reward."""
    return Answer({"scores": [score_of(text) for text in body["completions"]]})


def prefers(body: dict[str, Any], number: int) -> Answer:
    """The right answer to a judge."""
    first, second = shown(body)
    return says("A", 0.9) if score_of(first) >= score_of(second) else says("B", 0.1)


def after(number_of_right: int, right: Respond, faulty: Respond) -> Respond:
    """Faulty from this request on."""
    return lambda body, number: faulty(body, number) if number >= number_of_right else right(body, number)


def once(right: Respond, faulty: Respond) -> Respond:
    """Faulty at the first request."""
    return lambda body, number: right(body, number) if number else faulty(body, number)


def always(answer: Answer) -> Respond:
    return lambda body, number: answer


def number_for_each(number: str) -> Respond:
    """Scores that stand in the JSON as they are written here."""
    return lambda body, n: Answer(f'{{"scores": [{", ".join([number] * len(body["completions"]))}]}}'.encode())


def endless(piece: bytes, pause: float = 0.0) -> Answer:
    """An answer that has no end, in pieces."""

    def write(stream: Any) -> None:
        stream.write(HEAD)
        while True:
            stream.write(piece)
            time.sleep(pause)

    return Answer(write)


def raw(data: bytes) -> Answer:
    """These bytes in place of an answer of HTTP, and then the connection is closed."""
    return Answer(lambda stream: stream.write(data))


ANSWERS: dict[str, tuple[Answer, str, str]] = {
    "500": (error(500), "status 500", "status 500"),
    "503 with a long wait": (error(503, **{"Retry-After": "3600"}), "status 503", "status 503"),
    "429": (error(429), "status 429", "status 429"),
    "403": (error(403), "status 403", "status 403"),
    "400": (error(400), "status 400", "status 400"),
    "422": (error(422), "status 422", "status 422"),
    "an empty body": (Answer(b""), "the answer is empty", ""),
    "HTML": (Answer(b"<html>It works!</html>", headers={"Content-Type": "text/html"}), "no JSON", "no chat completion"),
    "half of the JSON": (Answer(b'{"choices": [{"mess'), "no JSON", "no chat completion"),
    "JSON null": (Answer(None), "the answer is None", "no chat completion"),
    "a JSON list": (Answer([1, 2]), "the answer is list", "no chat completion"),
    "a number": (Answer(1), "the answer is int", "no chat completion"),
    "a key twice": (Answer(b'{"scores": [1], "scores": [2]}'), "stands twice", ""),
    "deep nesting": (Answer(b'{"scores": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply", ""),
    "no UTF-8": (Answer(b'{"a": "\xff\xfe"}'), "decode", ""),
    "a gzip bomb": (
        Answer(gzip.compress(b" " * 10**7), headers={"Content-Encoding": "gzip"}),
        "the answer is compressed",
        "",
    ),
    "no gzip, but says so": (Answer(b"{}", headers={"Content-Encoding": "gzip"}), "the answer is compressed", ""),
    "20 MB": (Answer(b'{"a": "' + b"x" * 20_000_000 + b'"}'), "the answer is longer than", ""),
    "without an end": (endless(b"x" * 65536), "the answer is longer than", ""),
    "a header without an end": (
        Answer(
            lambda stream: [stream.write(b"HTTP/1.1 200 OK\r\nX: ")] + [stream.write(b"x" * 65536) for _ in range(99)]
        ),
        "",
        "",
    ),
    "a byte at a time": (endless(b" ", 0.05), "no whole answer within `timeout`", ""),
    "nothing": (Answer({}, delay=5.0), "no whole answer within `timeout`", ""),
    "half of its length": (raw(HEAD[:-2] + b"Content-Length: 100\r\n\r\n{"), "", ""),
    "no HTTP": (raw(b"\x00\xff" * 20 + b"\r\n\r\n"), "", ""),
    "no bytes": (raw(b""), "", ""),
    "control characters in its error": (error(400, "\x1b[2J\x1b[31mgone\x07"), "gone", "gone"),
    "a megabyte in its error": (error(400, "x" * 10**6), "status 400", "status 400"),
    "a status of its own": (Answer({}, 299), "", ""),
    "204": (Answer(b"", 204), "", ""),
}
"""Answers to every request, which count as failures, and what is said of them by a reward and by a judge."""
REFUSALS: dict[str, Answer] = {
    "401": error(401, "your key is wrong"),
    "402": error(402, "pay"),
    "404": error(404),
    "a redirect to itself": Answer(b"", 302, {"Location": "/v1"}),
    "a redirect to another host": Answer(b"", 307, {"Location": f"http://127.0.0.2:9/x?key={SECRET}"}),
    "a redirect to nowhere": Answer(b"", 301),
    "a redirect to a file": Answer(b"", 302, {"Location": "file:///etc/passwd"}),
}
"""What stops a run at once."""
