"""When a request to a judge's endpoint or to a reward service is sent again, and after what pause."""

from __future__ import annotations

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds between two attempts. The pause doubles each time, and a random pause of up to the same length is added."""

BUSY = (408, 409, 429)
"""HTTP statuses below 500 after which a request is sent again: time-out, conflict, too many requests."""
