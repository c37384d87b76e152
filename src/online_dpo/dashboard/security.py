"""Who may talk to the dashboard: programs of this machine's user that know the token of this launch.

- The address has the token once; the answer puts it into a cookie that scripts cannot read.
- The Host header must name this machine, so that no web site reaches the server by a name of its own.
- What changes something needs the page's origin and a second token, so that no other site's page can send it.
- Pages may load nothing from elsewhere, and run only the scripts that come with the dashboard.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote, urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CSRF_HEADER = "x-csrf-token"
SAFE_METHODS = ("GET", "HEAD")
LARGEST_BODY = 1 << 20
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """The token of a launch, and the names by which the server may be called.

    Args:
        token: the secret of this launch.
        host: the address to which the server is bound.
        port: its port, which the cookie's name has: cookies do not know ports.
    """

    token: str
    host: str
    port: int

    @classmethod
    def new(cls, host: str, port: int) -> Access:
        """Access with a new token."""
        return cls(secrets.token_urlsafe(24), host, port)

    @property
    def cookie(self) -> str:
        """The name of the cookie."""
        return f"online_dpo_{self.port}"

    @property
    def csrf_token(self) -> str:
        """What requests that change something must have in their header."""
        return hmac.new(self.token.encode(), b"csrf", hashlib.sha256).hexdigest()

    def knows_host(self, header: str) -> bool:
        """Whether a Host header names this machine."""
        try:
            given = urlsplit(f"//{header}")
        except ValueError:
            return False
        if given.netloc != header or "@" in header:  # more than a name and a port would change what URLs are read from
            return False
        name = given.hostname or ""
        if name in ("localhost", self.host.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return self.is_open and name in (socket.gethostname().lower(), socket.getfqdn().lower())
        return address.is_loopback or self.is_open  # no name of another site is an address

    @property
    def is_open(self) -> bool:
        """Whether other machines can reach the server."""
        return not is_loopback(self.host)

    def has_token(self, given: str) -> bool:
        """Whether the token is the one of this launch."""
        return hmac.compare_digest(given.encode(), self.token.encode())


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Middleware that lets requests pass as this module's text says.

    Args:
        app: what answers them.
        access: the token and the names.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                more = {**HEADERS, "cache-control": "no-store"}
                message["headers"] += [(k.encode(), v.encode()) for k, v in more.items() if k.encode() not in own]
            await send(message)

        refused = self._refusal(Request(scope))
        await (refused or self._app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """What is answered instead of the page; ``None`` for a request that may pass."""
        if not self._access.knows_host(request.headers.get("host", "")):
            return refuse(421, "The dashboard answers only under the name of this machine, such as localhost.")
        if self._access.has_token(request.query_params.get("token", "")):
            return self._with_cookie(request)
        if request.scope["path"].startswith("/static/"):  # what the router reads, without the Host header's words
            return None
        if not self._access.has_token(_cookie(request.headers, self._access.cookie)):
            return refuse(
                403, "Open the address that `online-dpo dashboard` has printed: it has the token of this launch."
            )
        return None if request.method in SAFE_METHODS else self._change_refusal(request)

    def _with_cookie(self, request: Request) -> Response:
        """Lead to the same address without the token, which stands in a cookie from then on."""
        rest = [(name, value) for name, value in request.query_params.multi_items() if name != "token"]
        path = "/" + quote(request.scope["path"].lstrip("/"))  # two slashes would lead to another host
        leading = RedirectResponse(f"{path}?{urlencode(rest)}" if rest else path, status_code=303)
        leading.set_cookie(self._access.cookie, self._access.token, httponly=True, samesite="lax", path="/")
        return leading

    def _change_refusal(self, request: Request) -> Response | None:
        origin, host = request.headers.get("origin", ""), request.headers.get("host", "")
        if origin not in (f"http://{host}", f"https://{host}"):
            return refuse(403, "This request comes from the page of another site.")
        if not hmac.compare_digest(request.headers.get(CSRF_HEADER, "").encode(), self._access.csrf_token.encode()):
            return refuse(403, "This page is older than the dashboard. Reload it.")
        if not request.headers.get("content-length", "").isdecimal():
            return refuse(411, "This request does not say how long it is.")
        if int(request.headers["content-length"]) > LARGEST_BODY:
            return refuse(413, "This request is too large.")
        return None


def _cookie(headers: Mapping[str, str], name: str) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return "" if cookie is None else cookie.value


def refuse(status: int, sentence: str) -> Response:
    """A page of one sentence, for those who may see nothing else."""
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>online-dpo</title><p>{sentence}</p></html>'
    return Response(page, status_code=status, media_type="text/html")
