"""Answers of services that are broken or hostile: each is a counted failure, or one clear stop; nothing is a guess."""

from __future__ import annotations

import gzip
import json
import math
import threading
import time

import pytest

from online_dpo.errors import FeedbackStopped
from online_dpo.scoring.rewards import http
from online_dpo.scoring.rewards.http import HTTPReward
from support.endpoint import Answer, comparison, comparisons, serving, serving_bytes

KEY = "sk-secret-0123456789"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DEEP = b'{"scores": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"


@pytest.fixture(autouse=True)
def small_answers(monkeypatch):
    monkeypatch.setattr(http, "LONGEST_ANSWER", 100_000)


def rewarding(endpoint, **settings) -> HTTPReward:
    return HTTPReward(endpoint.url, **{"attempts": 1, "timeout": 5.0, **settings})


def cause_of(reward: HTTPReward) -> str:
    """Why the two completions of one comparison have no score."""
    started = time.monotonic()
    [scores] = reward.score(comparisons(1))
    assert all(score is not None and math.isnan(score) for score in scores)
    assert time.monotonic() - started < 60
    return reward._failures.last_cause


def body(data: bytes, head: bytes = OK):
    return lambda connection: connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)


def endless(head: bytes, piece: bytes, pause: float = 0.0):
    def send(connection) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return send


# what is not read to its end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "send",
    [
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
        endless(OK + b"\r\n", b"x" * 4096),
        endless(OK + b"Content-Length: 1000000000000\r\n\r\n", b"x" * 4096),
        endless(b"HTTP/1.1 500 No\r\n\r\n", b"x" * 4096),
        body(b"[" + b"1, " * 100_000 + b"1]"),
    ],
)
def test_an_endless_answer_is_read_up_to_a_limit(send):
    with serving_bytes(send) as endpoint:
        assert cause_of(rewarding(endpoint)).startswith("the answer is longer than 1")


@pytest.mark.parametrize(
    "send",
    [
        endless(OK, b"X-More: and more\r\n" * 100),
        endless(b"HTTP/1.1 200 ", b"x" * 4096),
        endless(OK + b"X-Long: ", b"x" * 4096),
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * 4096),
        endless(b"", b"not HTTP at all\r\n\r\n"),
        lambda connection: None,
        lambda connection: connection.sendall(OK),
        lambda connection: connection.sendall(OK + b"Content-Length: 100\r\n\r\nx"),
        lambda connection: connection.sendall(OK + b"Content-Length: -1\r\n\r\nx"),
        lambda connection: connection.sendall(OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nxxxx"),
        lambda connection: connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffff\r\n"),
        lambda connection: connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    ],
)
def test_what_is_no_http_is_a_failure(send):
    with serving_bytes(send) as endpoint:
        assert cause_of(rewarding(endpoint))


@pytest.mark.parametrize(
    "send",
    [
        endless(OK + b"Content-Length: 1000\r\n\r\n", b"x", 0.05),
        endless(b"", b"H", 0.05),
        endless(OK + b"X-Slow: ", b"x", 0.05),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
        lambda connection: time.sleep(120),
    ],
)
def test_time_is_limited_as_a_whole(send):
    """The first byte and each next one come in time; the whole answer does not."""
    with serving_bytes(send) as endpoint:
        cause = cause_of(rewarding(endpoint, timeout=0.5))
    assert cause == "no whole answer within `timeout`, 0.5 s" or "Timeout" in cause


def test_a_compressed_answer_is_not_unpacked():
    bomb = gzip.compress(b" " * 50_000_000)
    for data in (bomb, gzip.compress(b'{"scores": [1, 2]}')):
        with serving_bytes(body(data, OK + b"Content-Encoding: gzip\r\n")) as endpoint:
            assert cause_of(rewarding(endpoint)) == "the answer is compressed (gzip), which was not asked for"


def test_the_encoding_that_an_answer_claims_is_not_used():
    """Python has encodings that unpack archives."""
    head = OK.replace(b"json", b"json; charset=zlib") + b"X: y\r\n"
    with serving_bytes(body(b'{"scores": [1, 2]}', head)) as endpoint:
        assert rewarding(endpoint).score(comparisons(1)) == [[1.0, 2.0]]
    with serving_bytes(body(b"no", b"HTTP/1.1 400 No\r\nContent-Type: text/plain; charset=zlib\r\n")) as endpoint:
        assert cause_of(rewarding(endpoint)) == "status 400: no"


# what is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "the answer is empty"),
        (b"  \n", "the answer is empty"),
        (b"<html>It works!</html>", "Expecting value"),
        (b'{"scores": [1.0, 2.0]', "delimiter"),
        (b'{"scores": [1.0, "\xff"]}', "can't decode byte 0xff"),
        (DEEP, "nested too deeply"),
        (b'{"a": ' * 20_000 + b"1" + b"}" * 20_000, "nested too deeply"),
        (b'{"scores": [1, 2], "scores": [2, 1]}', "the key 'scores' stands twice"),
        (b'{"scores": [1' + b"0" * 5000 + b", 2]}", "Exceeds the limit"),
        (b'{"scores": [1.0]}', "the answer has 1 scores for 2 completions"),
        (b'{"scores": []}', "the answer has 0 scores for 2 completions"),
        (b'{"scores": [1, 2, 3]}', "the answer has 3 scores for 2 completions"),
        (b'{"scores": 1.0}', 'wanted: {"scores"'),
        (b'{"scores": {"0": 1, "1": 2}}', 'wanted: {"scores"'),
        (b'{"error": "overloaded"}', "the answer is dict {'error': 'overloaded'}"),
        (b"[1.0, 2.0]", "the answer is list"),
        (b"null", "the answer is None"),
        (b"12", "the answer is int 12"),
    ],
)
def test_an_answer_of_another_form_is_a_failure(data, cause):
    with serving_bytes(body(data)) as endpoint:
        assert cause in cause_of(rewarding(endpoint))


@pytest.mark.parametrize(
    "score",
    [
        "1" + "0" * 400,
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "-Infinity",
        "true",
        "false",
        '"1.0"',
        '"NaN"',
        "[1]",
        "{}",
    ],
)
def test_a_score_that_is_no_number_is_missing_and_counted(score):
    with serving_bytes(body(b'{"scores": [%s, 0.5]}' % score.encode())) as endpoint:
        reward = rewarding(endpoint, max_failure_share=0.4)
        [[missing, given]] = reward.score([comparison("a", "b")])
        assert missing is not None and math.isnan(missing) and given == 0.5
        assert "the score at index 0 is " in reward._failures.last_cause
        with pytest.raises(FeedbackStopped, match=r"10 of the last 20 questions.*wanted: a finite number"):
            for _ in range(10):
                reward.score([comparison("a", "b")])


def test_null_does_not_apply_and_is_no_failure():
    with serving(lambda asked, number: Answer({"scores": [None, 1]})) as endpoint:
        reward = rewarding(endpoint, max_failure_share=0.0)
        assert [reward.score(comparisons(1)) for _ in range(30)] == [[[None, 1.0]]] * 30


def test_a_byte_order_mark_is_no_failure():
    with serving_bytes(body(b'\xef\xbb\xbf{"scores": [1, 2]}')) as endpoint:
        assert rewarding(endpoint).score(comparisons(1)) == [[1.0, 2.0]]


def test_a_wrong_form_stops_the_run_once_it_is_clear():
    with serving(lambda asked, number: Answer([1.0])) as endpoint:
        with pytest.raises(FeedbackStopped, match=r"to 20 of the last 20 questions.*Last cause: the answer is list"):
            rewarding(endpoint).score(comparisons(10))
        assert len(endpoint.seen) == 1


# statuses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [204, 304, 400, 403, 418, 422, 429, 500, 503, 599, 999])
def test_statuses_that_are_failures(status):
    with serving_bytes(lambda c: c.sendall(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)) as endpoint:
        reward = rewarding(endpoint)
        if status == 304:
            with pytest.raises(FeedbackStopped, match="a redirect without an address"):
                reward.score(comparisons(1))
        else:
            assert cause_of(reward).startswith(
                "no JSON: the answer is empty" if status == 204 else f"status {status}: X"
            )


@pytest.mark.parametrize("after", ["1000000000", "-5", "nan", "1e999", "Fri, 31 Dec 9999 23:59:59 GMT", "soon", ""])
def test_what_retry_after_asks_for_is_not_waited_for(after):
    """Pauses double, as documented."""
    with serving(lambda asked, number: Answer({}, 503, {"Retry-After": after})) as endpoint:
        assert cause_of(rewarding(endpoint, attempts=2)).startswith("status 503")
        assert len(endpoint.seen) == 2


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["another host", "the same place", "https"])
def test_no_redirect_is_followed_and_the_key_goes_nowhere(monkeypatch, status, place):
    monkeypatch.setenv("HOUSE_KEY", KEY)
    with serving(lambda asked, number: Answer({"scores": [1, 2]})) as other:
        places = {"another host": f"{other.url}?token={KEY}", "the same place": "/v1", "https": "https://127.0.0.1/x"}
        redirect = Answer({}, status, {"Location": places[place]})
        with serving(lambda asked, number: redirect) as endpoint:
            with pytest.raises(FeedbackStopped, match="a redirect to .*, which is not followed") as caught:
                rewarding(endpoint, api_key_env="HOUSE_KEY").score(comparisons(1))
            assert len(endpoint.seen) == 1
        assert not other.seen and KEY not in str(caught.value)


def test_proxies_of_the_environment_are_for_other_networks_only(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with serving(lambda asked, number: Answer({"scores": [1, 2]})) as endpoint:
        assert rewarding(endpoint).score(comparisons(1)) == [[1.0, 2.0]]


def test_tls_that_is_none_is_one_line():
    with serving(lambda asked, number: Answer({})) as endpoint:
        reward = HTTPReward(endpoint.url.replace("http:", "https:"), attempts=1)
        cause = cause_of(reward)
    assert "\n" not in cause and "SSL" in cause


# keys and texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"https://me:{KEY}@host/score",
        f"https://{KEY}@host/score",
        f"https://host/score?api_key={KEY}",
        f"https://host/score?n=1&access_token={KEY}",
        f"https://host/score?%61pi_key={KEY}",
        f"https://host/score#token={KEY}",
        f"https://host/score?code={KEY}",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_shown(url):
    with pytest.raises(ValueError, match="which would be shown in logs and model cards.*`api_key_env`") as caught:
        HTTPReward(url)
    assert KEY not in str(caught.value)


def test_the_name_is_of_the_path_alone():
    assert HTTPReward("http://host/v1/score?model=large").name == "score"
    assert HTTPReward("http://host:80").name == "host"


@pytest.mark.parametrize("key", [f"{KEY}\nX-Evil: 1", f"{KEY} {KEY}", f"{KEY}\x00"[:-1] + "\x1b", f"{KEY}é"])
def test_a_key_that_no_header_can_hold(monkeypatch, key):
    monkeypatch.setenv("HOUSE_KEY", key)
    with pytest.raises(ValueError, match="The key in the environment variable HOUSE_KEY holds blanks") as caught:
        HTTPReward("http://host", api_key_env="HOUSE_KEY")
    assert KEY not in str(caught.value)


def test_a_key_in_place_of_its_variable_is_not_shown():
    for key in (KEY, "abcdef0123456789abcdef"):
        with pytest.raises(ValueError, match="api_key_env") as caught:
            HTTPReward("http://host", api_key_env=key)
        assert key not in str(caught.value)


def test_the_key_is_shown_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("HOUSE_KEY", f" {KEY}\n")  # as a file with a line end gives it
    with serving(lambda asked, number: Answer({"error": KEY}, 400)) as endpoint:
        reward = rewarding(endpoint, api_key_env="HOUSE_KEY")
        assert "***" in cause_of(reward) and endpoint.seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert not any(KEY in text for text in (repr(vars(reward)), repr(reward), caplog.text))


def test_texts_of_services_cannot_act_on_a_terminal():
    text = "\x1b]0;title\x07\x1b[2J\x1b[31mno\x1b[0m\x00\r\n\u202egnp.exe\u2066 " + "x" * 1000
    with serving(lambda asked, number: Answer(text.encode(), 400)) as endpoint:
        cause = cause_of(rewarding(endpoint))
    assert cause.startswith("status 400: no gnp.exe xxx") and cause.isprintable() and len(cause) < 320


# threads --------------------------------------------------------------------------------------------------------------


def test_several_threads_may_score():
    with serving(lambda asked, number: Answer({"scores": [1] * len(asked["completions"])}, delay=0.05)) as endpoint:
        reward = rewarding(endpoint, batch_size=2, concurrency=3)
        results: list[list[list[float | None]]] = []
        threads = [threading.Thread(target=lambda: results.append(reward.score(comparisons(6)))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [[[1.0, 1.0]] * 6] * 3


def test_wrong_arguments():
    for name, value in [("batch_size", 0), ("concurrency", -1), ("attempts", 0), ("timeout", math.inf), ("timeout", 0)]:
        with pytest.raises(ValueError, match=f"`{name}` of an HTTPReward must be above 0; it is {value}"):
            HTTPReward("http://host", **{name: value})
    for url in ("http://", "ftp://host", "http://host:port", "http://[::1", "http://ho st/", "http://h/\x1b[2J"):
        with pytest.raises(ValueError, match="A reward's address") as caught:
            HTTPReward(url)
        assert str(caught.value).isprintable()


def test_json_of_what_is_sent_is_as_before():
    """Fields, their order, and how texts are written."""
    with serving(lambda asked, number: Answer({"scores": [1, 2]})) as endpoint:
        rewarding(endpoint, columns=["x"]).score([comparison("é", "b", x=1)])
    assert json.dumps(endpoint.seen[0].body) == (
        '{"prompts": ["Say something.", "Say something."], "completions": ["\\u00e9", "b"], "x": [1, 1]}'
    )
    assert endpoint.seen[0].headers["content-type"] == "application/json"
