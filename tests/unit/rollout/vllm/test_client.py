"""Calls of a vLLM server that hangs, dies or answers too slowly: each ends in time, and names the server."""

from __future__ import annotations

import re
import socket
import time

import pytest

from online_dpo.distributed.waiting import WAITS
from online_dpo.errors import RolloutServerError
from online_dpo.rollout.vllm import client
from online_dpo.rollout.vllm.client import VLLMClient
from support.busy import soon, tries
from support.endpoint import Answer, error, serving

BODY = {"prompt": [1, 2]}


def fails(client, cause, seconds):
    start = time.monotonic()
    with pytest.raises(RolloutServerError, match=re.escape(client.url)) as caught:
        client.call("/v1/completions", BODY)
    took = time.monotonic() - start
    assert cause in str(caught.value) and "`vllm_server_timeout`" in str(caught.value)
    assert took < seconds, f"{took:.1f} s"


def test_a_server_that_does_not_answer_is_given_up_after_a_second_try():
    """A connection may have been lost: a request that hangs is made once more, with the time-out anew."""
    with serving(lambda body, number: Answer({}, delay=120), path="") as endpoint:
        fails(VLLMClient(endpoint.url, timeout=0.5), "last cause: TimeoutError: timed out", seconds=60.0)
        soon(lambda: len(endpoint.seen) == 2)


def test_an_answer_that_drips_is_given_up_as_well():
    with serving(lambda body, number: Answer({"text": "x" * 1200}, drip=0.1), path="") as endpoint:
        fails(VLLMClient(endpoint.url, timeout=0.5), "the answer takes too long to arrive", seconds=60.0)


def test_a_server_that_is_gone_is_tried_until_the_time_out():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nothing listens there
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        fails(VLLMClient(url, timeout=0.5), "Connection refused", seconds=30.0)


@tries(3)
def test_a_server_that_dies_late_has_the_whole_time_to_come_back():
    """The time counts from when it died, not from when it was asked."""

    def answer(body, number):
        return Answer({}, 503, delay=0.7) if number == 0 else Answer({"fine": True}) if number > 2 else error(503)

    with serving(answer, path="") as endpoint:
        assert VLLMClient(endpoint.url, timeout=1.0).call("/x", BODY) == {"fine": True}


def test_the_server_is_named_while_it_is_waited_for():
    seen = []

    def answer(body, number):
        seen.extend(wait.who for wait in WAITS.innermost())
        return Answer({})

    with serving(answer, path="") as endpoint:
        VLLMClient(endpoint.url, timeout=5).call("/x", BODY)
        assert seen == [f"vLLM server {endpoint.url}"]


def refused(answer, seconds=25.0):
    """The error of a call that is answered so; there is one attempt."""
    with serving(lambda body, number: answer, path="") as endpoint:
        start = time.monotonic()
        with pytest.raises(RolloutServerError) as caught:
            VLLMClient(endpoint.url, timeout=30.0).call("/x", BODY)
        assert time.monotonic() - start < seconds and len(endpoint.seen) == 1
    return str(caught.value)


def test_an_endless_answer_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(client, "LONGEST_ANSWER", 1 << 20)
    assert "the answer has more than 1 MiB. Is this a vLLM server?" in refused(Answer({"text": "x" * (3 << 20)}))


def test_an_answer_of_deep_json_is_refused():
    assert "Is this a vLLM server?" in refused(Answer(b"[" * 200_000))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed_and_get_no_key(monkeypatch, status):
    monkeypatch.setenv("VLLM_API_KEY", "sk-1")
    with serving(lambda body, number: Answer({"fine": True}), path="") as other:
        told = refused(Answer(b"", status, {"Location": f"{other.url}/y"}))
        assert "another address, which is not followed" in told and str(status) in told
        assert not other.seen


def test_the_key_is_sent_where_there_is_one_and_told_of_where_it_is_wrong(monkeypatch):
    def answer(body, number):
        seen = endpoint.seen[number].headers.get("authorization")
        return Answer({"key": seen}) if seen in (None, "Bearer sk-1") else Answer(b"no", 401)

    with serving(answer, path="") as endpoint:
        calls = VLLMClient(endpoint.url, timeout=5.0)
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        assert calls.call("/x", BODY) == {"key": None}
        monkeypatch.setenv("VLLM_API_KEY", " sk-1\n")
        assert calls.call("/x", BODY) == {"key": "Bearer sk-1"}
        monkeypatch.setenv("VLLM_API_KEY", "sk-2")
        with pytest.raises(RolloutServerError, match="401.*Set VLLM_API_KEY to the key with which") as caught:
            calls.call("/x", BODY)
        assert "sk-2" not in str(caught.value)
