"""The server's part that asks for the key: nothing behind it is reached without."""

import asyncio

import pytest

from online_dpo.rollout.vllm.key import RequireKey


def ask(monkeypatch, headers, path="/collective_rpc", kind="http"):
    """Whether the server behind was reached, and what was sent."""
    monkeypatch.setenv("VLLM_API_KEY", "sk-1")
    reached, sent = [], []

    async def server(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": headers, "method": "POST"}
    asyncio.run(RequireKey(server)(scope, None, send))
    return bool(reached), sent


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer sk-2")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"sk-1")],
        [(b"authorization", b"Bearer sk-1"), (b"authorization", b"Bearer sk-2")],
        [(b"x-authorization", b"Bearer sk-1")],
        [(b"authorization", b"Bearer \xff")],
    ],
)
@pytest.mark.parametrize("path", ["/collective_rpc", "/v1/completions", "/pause", "/health/..", "//health", "/metrics"])
def test_without_the_key_no_path_is_reached(monkeypatch, headers, path):
    reached, [start, body] = ask(monkeypatch, headers, path)
    assert not reached and start["status"] == 401 and b"sk-1" not in body["body"]


def test_with_the_key_every_path_is_reached(monkeypatch):
    assert ask(monkeypatch, [(b"Authorization", b"Bearer sk-1")]) == (True, [])


def test_probes_need_no_key(monkeypatch):
    assert ask(monkeypatch, [], "/health") == (True, [])


def test_websockets_need_the_key_too(monkeypatch):
    assert ask(monkeypatch, [], kind="websocket") == (False, [{"type": "websocket.close", "code": 1008}])
