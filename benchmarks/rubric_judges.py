"""Endpoints that answer as judging language models would: by the quickstart's rubric, fairly or with a bias."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from online_dpo.quickstart.rubric import rubric

LIKING = 0.7
"""How probable the biased judge finds the first answer, whatever the answers say."""

CLOSE = 1.0
"""Up to this difference of points the judge in words says that the first answer is better."""

Respond = Callable[[dict[str, Any]], tuple[str, float | None]]
"""From the body of a request to the letter that is answered and, if log-probabilities are asked for, P(A)."""


def fair_judge(body: dict[str, Any]) -> tuple[str, float | None]:
    """Prefers the answer that the rubric likes better with probability 0.98."""
    p = _fair(body)
    return ("A" if p >= 0.5 else "B"), (p if body.get("logprobs") else None)


def biased_judge(body: dict[str, Any]) -> tuple[str, float | None]:
    """Prefers what stands first with probability 0.7, and is fair with the rest; its letter is always A."""
    return "A", (LIKING + (1 - LIKING) * _fair(body) if body.get("logprobs") else None)


def judge_in_words(body: dict[str, Any]) -> tuple[str, None]:
    """Gives its reason and then a verdict: the better answer by the rubric, or the first one if they are close."""
    first, second = _scores(body)
    letter = "A" if first >= second - CLOSE else "B"
    return f"By the rubric answer A has {first:g} points and answer B has {second:g}.\nVerdict: {letter}", None


@contextmanager
def serving(respond: Respond) -> Iterator[str]:
    """A chat endpoint that answers with ``respond``. Gives its address, and ends with the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            data = json.dumps(_chat_completion(*respond(body))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # connections that are opened at the same time

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def _fair(body: dict[str, Any]) -> float:
    one, other = _scores(body)
    return 0.5 if one == other else 0.98 if one > other else 0.02


def _scores(body: dict[str, Any]) -> tuple[float, float]:
    question = body["messages"][0]["content"]
    [(_, prompt)] = re.findall(r"<<<REQUEST (\w+)\n(.*?)\nREQUEST \1>>>", question, re.DOTALL)
    [(_, first), (_, second)] = re.findall(r"<<<ANSWER ([AB] \w+)\n(.*?)\nANSWER \1>>>", question, re.DOTALL)
    return rubric(prompt, first), rubric(prompt, second)


def _chat_completion(letter: str, p_first: float | None) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": letter}, "finish_reason": "stop"}
    if p_first is not None:
        top = [
            {"token": token, "logprob": math.log(p), "bytes": None}
            for token, p in {"A": p_first, "B": 1 - p_first}.items()
            if p > 0
        ]
        [own] = [entry for entry in top if entry["token"] == letter]
        choice["logprobs"] = {"content": [{**own, "top_logprobs": top}]}
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
