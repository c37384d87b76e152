"""The store of the trainer and the workers of vLLM servers, which only those reach who know the run's secret.

torch's `TCPStore` answers whoever connects. Here both sides first prove that they know the secret, without sending it;
the workers get it with the call of the server that has them connect. Messages are JSON: nothing is unpickled.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import socket
import struct
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from threading import Lock, Thread
from typing import Any

from torch.distributed import HashStore, Store  # pyright: ignore[reportPrivateImportUsage]

logger = logging.getLogger(__name__)

NONCE = PROOF = 32  # bytes
PROOF_SECONDS = 5.0  # for a stranger to prove that it is none
MOST_STRANGERS = 64  # connections that have proved nothing yet; more are closed at once
MOST_BYTES = 1 << 20  # of a message; what is stored are addresses, names and error messages
POLL_SECONDS = 0.005


class StoreLost(RuntimeError):
    """The store cannot be reached any more, or refuses this process."""


class StoreServer:
    """Answers the workers that know the secret. The trainer itself uses ``store``, in its own process.

    Args:
        listeners: listening sockets, which are closed with the server.
        secret: what members must know.
    """

    def __init__(self, listeners: Sequence[socket.socket], secret: str) -> None:
        self.store = HashStore()
        self._listeners, self._secret = list(listeners), secret
        self._members: set[socket.socket] = set()
        self._told: set[str] = set()
        self._strangers, self._lock, self._closed = 0, Lock(), False
        for listener in self._listeners:
            Thread(target=self._accept, args=(listener,), daemon=True, name="weights store").start()

    def close(self) -> None:
        """Frees the ports and closes all connections."""
        with self._lock:
            self._closed, members = True, list(self._members)
        for one in (*self._listeners, *members):
            with suppress(OSError):  # the other side may have closed it
                one.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
        for listener in self._listeners:
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(POLL_SECONDS)  # such as too many open files; others may be closed soon
                continue
            with self._lock:
                admitted = self._strangers < MOST_STRANGERS
                self._strangers += admitted
            if admitted:
                Thread(target=self._serve, args=(connection, address), daemon=True, name="weights store").start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        with connection:
            try:
                is_member = _is_member(connection, self._secret)
            finally:
                with self._lock:
                    self._strangers -= 1
            if not is_member:
                self._warn(address[0])
                return
            with self._lock:
                if self._closed:
                    return
                self._members.add(connection)
            try:
                while True:
                    _send(connection, self._answer(_receive(connection)))
            except (OSError, ValueError, LookupError, TypeError, RuntimeError):
                pass  # the worker is gone, or asks for what it never asks for
            finally:
                with self._lock:
                    self._members.discard(connection)

    def _warn(self, address: str) -> None:
        """Tells of a stranger, once for each address."""
        with self._lock:
            known = address in self._told or self._closed
            self._told |= {address} if len(self._told) < MOST_STRANGERS else set()
        if not known:
            logger.warning("%s tried to join the transfer of weights without its secret, and was turned away", address)

    def _answer(self, request: Any) -> Any:
        operation, *arguments = request
        return OPERATIONS[operation](self.store, *arguments)


class GuestStore(Store):
    """The store of a worker, which asks that of the trainer. ``address`` is this side's, as the trainer sees it.

    Raises:
        StoreLost: the trainer cannot be reached, or does not know the secret, or this side does not.
    """

    def __init__(self, host: str, port: int, secret: str, timeout: float) -> None:
        super().__init__()
        self._lock, self._timeout = Lock(), timedelta(seconds=timeout)
        try:
            self._connection = socket.create_connection((host, port), timeout)
            _prove(self._connection, secret)
            self._connection.settimeout(timeout)  # the trainer answers at once
        except OSError as error:
            raise StoreLost(str(error)) from error
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.address: str = self._connection.getsockname()[0]

    def set(self, key: str, value: str | bytes) -> None:
        """Sets a value."""
        self._ask("set", key, _encoded(value))

    def get(self, key: str) -> bytes:
        """Waits for a value, and returns it."""
        self.wait([key], self._timeout)
        return b64decode(self._ask("get", key))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys have values."""
        return self._ask("check", keys)

    def add(self, key: str, amount: int) -> int:
        """Adds to a number, and returns the sum."""
        return self._ask("add", key, amount)

    def delete_key(self, key: str) -> bool:
        """Deletes a value."""
        return self._ask("delete_key", key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits until all keys have values.

        Raises:
            StoreLost: they do not come in time.
        """
        until = time.monotonic() + (self._timeout if timeout is None else timeout).total_seconds()
        while not self.check(keys):
            if time.monotonic() > until:
                raise StoreLost(f"nobody has set {', '.join(keys)} in time")
            time.sleep(POLL_SECONDS)

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets how long `get` and `wait` wait."""
        self._timeout = timeout

    def _ask(self, *request: Any) -> Any:
        try:
            with self._lock:
                _send(self._connection, request)
                return _receive(self._connection)
        except (OSError, ValueError) as error:
            raise StoreLost(str(error) or type(error).__name__) from error


def _stored(store: HashStore, key: str) -> str:
    return b64encode(store.get(key)).decode()


OPERATIONS: dict[str, Callable[..., Any]] = {
    "set": lambda store, key, value: store.set(key, b64decode(value)),
    "get": _stored,
    "check": lambda store, keys: store.check(keys),
    "add": lambda store, key, amount: store.add(key, amount),
    "delete_key": lambda store, key: store.delete_key(key),
}


def _encoded(value: str | bytes) -> str:
    return b64encode(value.encode() if isinstance(value, str) else value).decode()


def _is_member(connection: socket.socket, secret: str) -> bool:
    """The trainer's side of the proof: it gives its own, and checks that of the other side."""
    until = time.monotonic() + PROOF_SECONDS
    try:
        theirs, ours = _read(connection, NONCE, until), secrets.token_bytes(NONCE)
        connection.sendall(ours + _proof(secret, b"trainer", theirs + ours))
        if not hmac.compare_digest(_read(connection, PROOF, until), _proof(secret, b"worker", theirs + ours)):
            return False
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        return False
    return True


def _prove(connection: socket.socket, secret: str) -> None:
    """The worker's side of the proof."""
    until, ours = time.monotonic() + PROOF_SECONDS, secrets.token_bytes(NONCE)
    connection.sendall(ours)
    theirs = _read(connection, NONCE, until)
    if not hmac.compare_digest(_read(connection, PROOF, until), _proof(secret, b"trainer", ours + theirs)):
        raise ConnectionError("what answers there does not know the secret of this run")
    connection.sendall(_proof(secret, b"worker", ours + theirs))


def _proof(secret: str, who: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret.encode(), who + nonces, "sha256")


def _read(connection: socket.socket, size: int, until: float | None = None) -> bytes:
    """Reads exactly this many bytes, until a time if one is given."""
    data = b""
    while len(data) < size:
        if until is not None:
            connection.settimeout(max(until - time.monotonic(), 0.001))
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError("the connection was closed")
        data += piece
    return data


def _send(connection: socket.socket, message: Any) -> None:
    data = json.dumps(message).encode()
    connection.sendall(struct.pack(">I", len(data)) + data)


def _receive(connection: socket.socket) -> Any:
    [size] = struct.unpack(">I", _read(connection, 4))
    if size > MOST_BYTES:
        raise ConnectionError(f"a message of {size} bytes")
    return json.loads(_read(connection, size))
