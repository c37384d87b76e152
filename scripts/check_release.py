"""Checks that a tag is the version of the package, and that the changelog and the citation are ready for it.

``python scripts/check_release.py v0.1.0``. It reads files only and needs nothing installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What is not ready for a release with this tag, a line each."""
    version = _only(r'^__version__ = "(.+)"$', root / "src/online_dpo/__init__.py")
    cited = _only(r"^version: (.+)$", root / "CITATION.cff")
    changelog = (root / "CHANGELOG.md").read_text()
    found = []
    if tag != f"v{version}":
        found.append(
            f"the tag is {tag or 'missing'}, and the version in src/online_dpo/__init__.py asks for v{version}"
        )
    if cited != version:
        found.append(f"CITATION.cff says {cited}, src/online_dpo/__init__.py {version}")
    section = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE
    )
    if section is None:
        found.append(f"CHANGELOG.md has no section `## [{version}] - YEAR-MONTH-DAY`")
    elif not re.search(r"^- ", section[1], re.MULTILINE):
        found.append(f"the section of {version} in CHANGELOG.md has no entry")
    return found


def _only(pattern: str, file: Path) -> str:
    [value] = re.findall(pattern, file.read_text(), re.MULTILINE)
    return value


if __name__ == "__main__":
    for problem in (unready := problems(" ".join(sys.argv[1:]))):
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(bool(unready))
