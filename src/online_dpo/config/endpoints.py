"""Addresses and keys of services that are asked over HTTP. Imports nothing heavy.

A key comes from an environment variable and from nowhere else. An address is no place for one: it is shown in errors
and logs, the names of rewards and judges are made of it, and those are written into model cards and checkpoints.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>,]+")
_SECRET_PARAMETER = re.compile(
    r"key|token|secret|passw|pwd|auth|credential|^(sig|signature|code|user|username|bearer|jwt|session)$", re.IGNORECASE
)
_SECRET_FIELD = re.compile(
    r"^(.*[-_])?(api[-_]?key|apikey|authorization|access[-_]?token|auth[-_]?token|token|secret|password|bearer)$",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USUAL_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")


def check_address(url: str, field: str, where_keys_go: str) -> SplitResult:
    """Check an address of HTTP, and return its parts.

    Args:
        field: what the address is called in messages.
        where_keys_go: what to do with a key, as a sentence.

    Raises:
        ValueError: it is no address of HTTP, or it holds something that looks like a secret, which is not shown.
    """
    if holds_secret(url):
        raise ValueError(
            f"{field} holds a user name, a password or a key, which would be shown in logs and model cards. "
            f"{where_keys_go}"
        )
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is none
    except ValueError as problem:
        raise ValueError(f"{field} is no address: {url!r} ({problem}).") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise ValueError(f"{field} must begin with http:// or https://, and name a host; it is {url!r}.")
    return parts


def holds_secret(url: str) -> bool:
    """Whether an address has a user name or password, or a parameter with a name such as ``api_key``.

    >>> holds_secret("https://me:pass@host/score"), holds_secret("http://host/?token=x"), holds_secret("http://h/?n=3")
    (True, True, False)
    """
    before, _, fragment = url.partition("#")
    before, _, query = before.partition("?")
    authority = before.partition("://")[2].partition("/")[0]
    parameters = [*parse_qsl(query, keep_blank_values=True), *parse_qsl(fragment, keep_blank_values=True)]
    return "@" in authority or any(_SECRET_PARAMETER.search(name) for name, _ in parameters)


def secrets_in(value: Any, depth: int = 0) -> Iterator[str]:
    """Where a value of a run file holds an address with a secret: one text for each, without the secret."""
    if isinstance(value, str):
        if any(holds_secret(address) for address in _ADDRESS.findall(value)):
            yield (
                "holds an address with a user name, a password or a key, which would be shown in logs and model cards. "
                "Put the key into an environment variable, and take it out of the address"
            )
    elif isinstance(value, Mapping) and depth < 20:
        for item in value.values():
            yield from secrets_in(item, depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, bytes) and depth < 20:
        for item in value:
            yield from secrets_in(item, depth + 1)


def secret_fields(value: Any) -> list[str]:
    """The names of fields, also of those inside of others, that look like the names of keys: ``api_key``."""
    if isinstance(value, Mapping):
        own = [str(name) for name in value if _SECRET_FIELD.match(str(name))]
        return own + [name for item in value.values() for name in secret_fields(item)]
    return [name for item in value for name in secret_fields(item)] if isinstance(value, (list, tuple)) else []


def shown_address(url: str) -> str:
    """An address for messages: without user name, password, query and fragment.

    >>> shown_address("https://me:pass@host:80/score?token=x")
    'https://host:80/score'
    """
    before = re.split(r"[?#]", url, maxsplit=1)[0]
    scheme, separator, rest = before.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}"


def check_variable(variable: str, field: str) -> None:
    """Check the name of an environment variable that holds a key.

    Raises:
        ValueError: it cannot be a name. It is not shown: it may be the key itself.
    """
    if not _VARIABLE.fullmatch(variable):
        raise ValueError(
            f"`{field}` is not the name of an environment variable. Put the key into a variable, and give the name of "
            "that one here, not the key."
        )


def read_key(variable: str) -> str | None:
    """The key in an environment variable, without blanks around it; ``None`` if there is none.

    Raises:
        ValueError: a header cannot hold it. It is not shown.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(
            f"The key in {shown_variable(variable)} holds blanks, line ends, or characters that are not ASCII. Set it "
            "to the key alone."
        )
    return key or None


def shown_variable(variable: str) -> str:
    """The name of a variable for messages. One that looks like a key instead of a name is not shown."""
    if variable in os.environ or _USUAL_VARIABLE.fullmatch(variable):
        return f"the environment variable {variable}"
    return "the environment variable that `api_key_env` names"


def in_own_network(url: str) -> bool:
    """Whether an address names this machine or one that only its own network knows.

    >>> in_own_network("http://10.0.0.7:8000/v1"), in_own_network("https://api.openai.com/v1")
    (True, False)
    """
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:  # a name
        return "." not in host or host.endswith((".local", ".internal"))
