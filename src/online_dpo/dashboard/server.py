"""Starts the dashboard's server, and ends it quietly."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from online_dpo.dashboard.app import create_app
from online_dpo.dashboard.catalog import Catalog
from online_dpo.dashboard.context import Dashboard
from online_dpo.dashboard.security import Access
from online_dpo.distributed.signals import StoppedBySignal

WRONG_INPUT = 2
LONGEST_ADDRESS = 1 << 17
"""Bytes of a request without its body: many metrics may be asked for at once, and have long names."""


@dataclass(frozen=True)
class ServerOptions:
    """How a dashboard is to be served.

    >>> ServerOptions(folders=[Path("runs")], host="127.0.0.1", port=8765, opens_browser=False)
    """

    folders: Sequence[Path]
    host: str
    port: int
    opens_browser: bool | None
    """``None``: where there is a desktop to open it on."""


def serve(options: ServerOptions) -> int:
    """Serve a dashboard until it is interrupted; returns the exit code."""
    try:
        listening = _listen(options.host, options.port)
    except OSError as error:
        print(f"error: {_why_not(error, options)}", file=sys.stderr)
        return WRONG_INPUT
    with listening:
        port = listening.getsockname()[1]
        dashboard = Dashboard(Catalog(options.folders), Access.new(options.host, port))
        _announce(dashboard, options)
        try:
            _run(dashboard, listening)
        except StoppedBySignal as stopped:  # Ctrl-C is how a dashboard ends; another signal is told as everywhere
            if stopped.signal is not signal.SIGINT:
                raise
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=128)


def _why_not(error: OSError, options: ServerOptions) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {options.port} is in use. Give another one: --port {options.port + 1}, or --port 0 for any free one."
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {options.port} may not be used by this user. Give one above 1023: --port 8765"
    return f"--host {options.host}: this machine has no such address ({error.strerror or error})."


def _run(dashboard: Dashboard, listening: socket.socket) -> None:
    app = create_app(dashboard)
    # without the websockets, proxies and colours that the dashboard has no use for
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        http="h11",
        loop="asyncio",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=LONGEST_ADDRESS,
    )
    server = uvicorn.Server(config)
    app.state.is_ending = lambda: server.should_exit
    server.run(sockets=[listening])


def _announce(dashboard: Dashboard, options: ServerOptions) -> None:
    access = dashboard.access
    name = f"[{options.host}]" if ":" in options.host else options.host
    if name in ("0.0.0.0", "[::]"):  # nosec B104: what the user has asked for
        name = socket.gethostname()
    address = f"http://{name}:{access.port}/?token={access.token}"
    if access.is_open:
        print(
            f"warning: --host {options.host}: other machines can reach the dashboard, without encryption. Who knows "
            "the address below sees all prompts and answers. Safer: ssh -L to this machine.",
            file=sys.stderr,
        )
    print(f"Dashboard: {address}\nCtrl-C ends it.", flush=True)
    if options.opens_browser or (options.opens_browser is None and _has_desktop()):
        webbrowser.open(address)


def _has_desktop() -> bool:
    """Whether a browser would open in a window in front of the user, not in the terminal or on another machine."""
    if not sys.stdout.isatty() or "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
