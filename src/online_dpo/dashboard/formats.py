"""How pages write numbers, times and JSON."""

from __future__ import annotations

import json
import math
import time
from typing import Any


def number(value: float | None, digits: int = 4) -> str:
    """A number in a few characters; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 2}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.0f} %"


def duration(seconds: float | None, units_shown: int = 2) -> str:
    """A length of time in its largest units."""
    if seconds is None or not 0 <= seconds < 1e10:
        return "–"
    whole = int(seconds)
    units = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((place for place, (count, _) in enumerate(units) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + units_shown] if count or unit == "s")


def ago(moment: float | None) -> str:
    """How long ago a moment was."""
    if moment is None or not 0 < moment < 1e11:
        return "–"
    seconds = max(0.0, time.time() - moment)
    return "just now" if seconds < 5 else f"{duration(seconds, 1)} ago"


def clock(moment: float | None) -> str:
    """A moment as date and time of this machine."""
    if moment is None or not 0 < moment < 1e11:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def json_text(value: Any) -> str:
    """A value as JSON, for an attribute of an element; it is escaped as any text."""
    return json.dumps(value, ensure_ascii=True)


FILTERS = {
    "number": number,
    "percent": percent,
    "duration": duration,
    "ago": ago,
    "clock": clock,
    "json_text": json_text,
}
