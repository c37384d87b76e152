"""The key of vLLM servers: what the trainer sends, and the part of the server that asks for it on every path.

vLLM itself asks for ``VLLM_API_KEY`` on some paths only, not on those that replace weights and call the workers. It
imports this module, so its imports must stay light.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

VARIABLE = "VLLM_API_KEY"
"""The environment variable that holds the key, for vLLM and here, on both sides."""
MIDDLEWARE = "online_dpo.rollout.vllm.key.RequireKey"
OPEN = "/health"
"""The path that probes ask; it says nothing but that the server runs."""

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class RequireKey:
    """ASGI middleware that answers 401 to requests without the key."""

    def __init__(self, app: Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ[VARIABLE].strip()}".encode()

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == OPEN or self._is_known(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b"This server asks for a key."})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_known(self, scope: Mapping[str, Any]) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
