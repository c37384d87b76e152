"""Warnings of the scorers."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from support.shared_prefix import LOGGER


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Warnings that sharing makes, as they come."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger(LOGGER).addHandler(handler)
    yield said
    logging.getLogger(LOGGER).removeHandler(handler)
