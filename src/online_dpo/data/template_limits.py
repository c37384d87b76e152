"""Limits of time and memory for chat templates: programs of their authors that may loop without an end, or fill memory.

The sandbox that transformers runs them in keeps them from files and processes, but counts neither.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

SECONDS = 5.0
"""For one text. Templates take less than a millisecond."""
MORE_BYTES = 2**31
"""Memory that the first text of a template may take beyond what the process has."""

_tried: set[int] = set()


class TemplateLimitError(Exception):
    """A chat template took too long, or might. The message says so."""


@contextmanager
def template_limits(template: Any) -> Iterator[None]:
    """Inside, a chat template is applied. One that takes too long is stopped with `TemplateLimitError`; the first time
    that a template is used, one that takes too much memory gets a `MemoryError`.

    In other threads than the main one there are no limits: no signal can stop what runs there. Nor are there where a
    timer of other code runs, nor on other systems than Linux, which alone has been tried.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if sys.platform != "linux" or not in_main_thread or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return
    key = hash(str(template))
    first = key not in _tried
    if first:
        _check_no_powers(template)
        _tried.add(key)
    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        if first:
            with _memory_limit():
                yield
        else:
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _check_no_powers(template: Any) -> None:
    """Refuse ``**``: one such operation can take hours, and no signal stops it."""
    texts = template.values() if isinstance(template, dict) else [template]
    for text in texts:
        try:
            tokens = list(Environment(autoescape=True).lex(text)) if isinstance(text, str) else []
        except TemplateSyntaxError:
            continue  # it is told where the template is used
        if any(kind == "operator" and value == "**" for _, kind, value in tokens):
            raise TemplateLimitError("it computes powers, `**`, which may take without an end")


def _stop(number: int, frame: FrameType | None) -> None:
    raise TemplateLimitError(f"it was stopped after {SECONDS:.0f} seconds")


@contextmanager
def _memory_limit() -> Iterator[None]:
    resource: Any = importlib.import_module("resource")  # other systems do not have it
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _address_space() + MORE_BYTES
    if soft != resource.RLIM_INFINITY and soft < most:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
