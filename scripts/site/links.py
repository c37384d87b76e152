"""Asks every address on the net that a page names whether it is there: `make links`. CI does not ask."""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDRESS = re.compile(r"\]\((https?://[^)\s#]+)")


def addresses() -> dict[str, str]:
    """Each address with the first page that names it."""
    found: dict[str, str] = {}
    for page in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]:
        for address in ADDRESS.findall(page.read_text(encoding="utf-8")):
            found.setdefault(address, str(page.relative_to(ROOT)))
    return found


def problem(address: str) -> str | None:
    """Why there is no page, or ``None``."""
    request = urllib.request.Request(address, headers={"User-Agent": "online-dpo-links"})
    try:
        with urllib.request.urlopen(request, timeout=20):  # nosec B310: ADDRESS takes http and https alone
            return None
    except (OSError, urllib.error.URLError) as error:
        return str(error)


if __name__ == "__main__":
    wrong = [f"{page}: {address}: {why}" for address, page in addresses().items() if (why := problem(address))]
    print("\n".join(wrong) or "every address answers")
    sys.exit(bool(wrong))
