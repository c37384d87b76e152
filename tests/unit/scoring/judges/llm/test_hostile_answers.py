"""Answers of endpoints that are broken or hostile: a missing preference that is counted, or one clear stop."""

from __future__ import annotations

import gzip
import json
import math
import time
from typing import Any

import pytest

from online_dpo.config.llm_judge import JudgeSettings
from online_dpo.errors import FeedbackStopped
from online_dpo.scoring.judges.llm import client
from online_dpo.scoring.judges.llm.client import _retry_after
from online_dpo.scoring.judges.llm.judge import LLMJudge
from support.endpoint import Answer, comparison, comparisons, error, says, serving, serving_bytes
from support.llm_judges import judge_of

KEY = "sk-secret-0123456789"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture(autouse=True)
def small_answers(monkeypatch):
    monkeypatch.setattr(client, "LONGEST_ANSWER", 100_000)


def cause_of(endpoint, **settings) -> str:
    """Why one comparison has no preference, asked once in one order."""
    judge = judge_of(endpoint, **{"order": "given", "attempts": 1, "request_timeout": 3.0, **settings})
    started = time.monotonic()
    assert judge.prefer([comparison("x", "y")]) == [None]
    assert time.monotonic() - started < 60
    metrics = judge.metrics()
    assert metrics["judge/failed"] + metrics["judge/unparsable"] == 1 and metrics["judge/cost"] == 0
    return judge.last_failure


def body(data: bytes, head: bytes = OK):
    return lambda connection: connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)


def endless(head: bytes, piece: bytes, pause: float = 0.0):
    def send(connection) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return send


def changed(path: str, value: Any) -> bytes:
    """A chat completion of `A` with log-probabilities, in which something is another value; as JSON."""
    whole = says("A", 0.7).body
    *parents, last = path.split("/")
    place = whole
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(whole).encode()


# what is not read to its end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "send",
    [
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
        endless(OK + b"Content-Length: 1000000000000\r\n\r\n", b"x" * 4096),
        endless(b"HTTP/1.1 500 No\r\n\r\n", b"x" * 4096),
    ],
)
def test_an_endless_answer_is_read_up_to_a_limit(monkeypatch, send):
    monkeypatch.setattr(client, "BYTES_A_TOKEN", 0)
    with serving_bytes(send) as endpoint:
        assert cause_of(endpoint) == "the answer is longer than 100000 bytes"


@pytest.mark.parametrize(
    "send",
    [
        endless(OK, b"X-More: and more\r\n" * 100),
        endless(b"", b"not HTTP at all\r\n\r\n"),
        lambda connection: None,
        lambda connection: connection.sendall(OK + b"Content-Length: 100\r\n\r\nx"),
        lambda connection: connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
        lambda connection: connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n"),
    ],
)
def test_what_is_no_http_is_a_failure(send):
    with serving_bytes(send) as endpoint:
        assert cause_of(endpoint)


@pytest.mark.parametrize(
    "send",
    [
        endless(OK + b"Content-Length: 1000\r\n\r\n", b" ", 0.05),
        endless(b"", b"H", 0.05),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    ],
)
def test_time_is_limited_as_a_whole(send):
    with serving_bytes(send) as endpoint:
        assert "no reply within `request_timeout`, 0.5 s" in cause_of(endpoint, request_timeout=0.5)


def test_a_compressed_answer_is_not_unpacked():
    with serving_bytes(body(gzip.compress(b" " * 50_000_000), OK + b"Content-Encoding: gzip\r\n")) as endpoint:
        assert cause_of(endpoint) == "the answer is compressed (gzip), which was not asked for"
    head = b"HTTP/1.1 500 No\r\nContent-Type: text/plain; charset=zlib\r\n"
    with serving_bytes(body(b"no", head)) as endpoint:
        assert cause_of(endpoint).startswith("status 500")


# what is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"<html>It works!</html>",
        b'{"choices": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"choices": [{"message": {"content": "A"}}], "choices": []}',
        b'{"choices": [{"message": {"content": "\xff"}}]}',
        changed("choices", {}),
        changed("choices/0/message", "A"),
        changed("choices/0/message/content", ["A"]),
        changed("choices/0/message/content", {"text": "A"}),
        changed("choices/0/message/content", True),
        changed("choices/0/message/content", 10**400),
        changed("choices/0/logprobs", "none"),
        changed("choices/0/logprobs/content", [1]),
        changed("choices/0/logprobs/content/0/token", 5),
        changed("choices/0/logprobs/content/0/bytes", 10**12),
        changed("choices/0/logprobs/content/0/bytes", [999]),
        changed("choices/0/logprobs/content/0/bytes", ["A"]),
        changed("choices/0/logprobs/content/0/logprob", "-0.1"),
        changed("choices/0/logprobs/content/0/top_logprobs/0/logprob", math.nan),
        changed("choices/0/logprobs/content/0/top_logprobs/0/logprob", math.inf),
        changed("choices/0/logprobs/content/0/top_logprobs/0/logprob", 1000.0),
        changed("choices/0/logprobs/content/0/top_logprobs/0/logprob", 10**400),
        changed("choices/0/logprobs/content/0/top_logprobs/0/logprob", True),
        changed("choices/0/logprobs/content/0/top_logprobs/0/token", ["A"]),
    ],
)
def test_an_answer_of_another_form_is_a_failure(data):
    with serving_bytes(body(data)) as endpoint:
        assert "no chat completion from http" in cause_of(endpoint)


@pytest.mark.parametrize("value", [-(10**6), 10**30, 1.5, math.nan, math.inf, "7", True, None, [1]])
def test_a_count_of_tokens_that_is_none_is_estimated(value):
    """So that no endpoint can make the budget larger, or end it."""
    prices = {"input_price": 1e6, "output_price": 1e6, "max_cost": 1e9}
    data = changed("usage/prompt_tokens", value)
    with serving_bytes(body(data)) as endpoint:
        judge = judge_of(endpoint, order="given", **prices)
        assert judge.prefer([comparison("x", "y")]) == [pytest.approx(0.7)]
        metrics = judge.metrics()
    assert 100 < metrics["judge/input_tokens"] < 1000 and metrics["judge/output_tokens"] == 1
    assert metrics["judge/cost"] == metrics["judge/input_tokens"] + 1


def test_half_a_surrogate_pair_in_an_answer_and_in_a_question(tmp_path):
    data = b'{"choices": [{"message": {"content": "\\ud800 is nice\\nVerdict: B"}}]}'
    path = str(tmp_path / "cache.sqlite3")
    asked = [comparison("x \ud800", "y", prompt="\udfff")]
    with serving_bytes(body(data)) as endpoint:
        for _ in range(2):
            assert judge_of(endpoint, order="random", cache=path).prefer(asked)[0] in (0.0, 1.0)
        assert len(endpoint.seen) == 1


def test_texts_of_services_cannot_act_on_a_terminal(caplog):
    text = "\x1b]0;title\x07\x1b[2Jno\x1b[0m\x00\n\u202egnp.exe\u2066" + "x" * 5000
    with serving(lambda asked, number: error(500, text)) as endpoint:
        cause = cause_of(endpoint)
        judge = judge_of(endpoint, order="given", attempts=1, concurrency=1)
        with pytest.raises(FeedbackStopped) as stopped:
            judge.prefer(comparisons(30))
    assert cause.isprintable() and len(cause) < 320 and "gnp.exe" in cause
    assert str(stopped.value).isprintable() and caplog.text.replace("\n", "").isprintable()


# redirects, addresses, keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed_and_the_key_goes_nowhere(monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda asked, number: says("A")) as other:
        for target in (f"{other.url}/chat/completions?token={KEY}", "/v1/chat/completions"):
            redirect = Answer({}, status, {"Location": target})
            with serving(lambda asked, number, redirect=redirect: redirect) as endpoint:
                with pytest.raises(FeedbackStopped, match="a redirect to .* not followed. Give the") as caught:
                    judge_of(endpoint, order="given", concurrency=1).prefer(comparisons(3))
                assert len(endpoint.seen) <= 2 and KEY not in str(caught.value)
        assert not other.seen


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("2.5", 2.5),
        ("1000000000", 1e9),
        ("1e999", math.inf),
        ("-5", None),
        ("0", None),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Mon, 01 Jan 1990 00:00:00 GMT", None),
        ("Fri, 31 Dec 99999999 23:59:59 GMT", None),
        ("Fri, 99 Dec 2030 23:59:59 GMT", None),
        (None, None),
    ],
)
def test_retry_after(header, seconds):
    assert _retry_after(header) == seconds


@pytest.mark.parametrize("after", ["1000000000", "1e999", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_an_absurd_retry_after_is_not_waited_for(after):
    with serving(lambda asked, number: error(429, "busy", **{"Retry-After": after})) as endpoint:
        assert "busy" in cause_of(endpoint, attempts=3)
        assert len(endpoint.seen) == 1


@pytest.mark.parametrize("key", [f"{KEY}\nX-Evil: 1", f"{KEY} b", f"{KEY}é", f"{KEY}\x1b"])
def test_a_key_that_no_header_can_hold(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="The key in the environment variable OPENAI_API_KEY holds blanks") as caught:
        LLMJudge(model="m", cache=None)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", [KEY, "abcdef0123456789abcdef"])
def test_a_key_in_place_of_its_variable_is_not_shown(key):
    with pytest.raises(ValueError, match="api_key_env") as caught:
        LLMJudge(model="m", api_key_env=key)
    assert key not in str(caught.value)


def test_a_key_with_a_line_end_as_a_file_gives_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with serving(lambda asked, number: says("A")) as endpoint:
        assert judge_of(endpoint, order="given").prefer([comparison("x", "y")]) == [1.0]
    assert endpoint.seen[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("name", ["api_key", "apiKey", "Authorization", "x-api-key", "access_token", "password"])
def test_keys_among_the_extra_fields_are_refused(name):
    for extra in ({name: KEY}, {"extra_headers": [{name: KEY}]}):
        with pytest.raises(ValueError, match=f"`extra` holds `{name}`") as caught:
            JudgeSettings(model="m", base_url="http://localhost/v1", extra=extra)
        assert KEY not in str(caught.value)
    JudgeSettings(model="m", extra={"max_tokens": None, "stop_token_ids": [1], "seed": 0})
