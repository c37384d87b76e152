"""Files of a run folder that are written whole: settings and environment. A user's own file is never touched."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from online_dpo.checkpoints.files import write_text
from online_dpo.runs.layout import ENVIRONMENT, SETTINGS, SETTINGS_BESIDE
from online_dpo.runs.plain_json import plain_or_named

_FIRST_LINE = re.compile(r"# Written by online-dpo \S+ \(([0-9a-f]{12})\)")
SESSIONS = "sessions"


def write_settings(folder: Path, text: str, version: str) -> Path | None:
    """Writes the settings of a run, and returns where: into ``run.yaml``, or beside it if that is a user's own. Where
    both are, nothing is written.
    """
    heading = (
        f"# Written by online-dpo {version} ({_digest(text)}). Repeat the run: online-dpo train FILE --output_dir DIR"
    )
    for name in (SETTINGS, SETTINGS_BESIDE):
        path = folder / name
        if is_free(path):
            write_text(path, f"{heading}\n{text}")
            return path
    return None


def is_free(path: Path) -> bool:
    """Whether settings may be written to this path: there is nothing, or what we have written and nobody changed."""
    return is_ours(path) or not (path.exists() or path.is_symlink())


def is_ours(path: Path) -> bool:
    """Whether a file holds settings as `write_settings` wrote them."""
    if path.is_symlink() or not path.is_file():
        return False
    first, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    found = _FIRST_LINE.match(first)
    return found is not None and found[1] == _digest(rest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def add_session(folder: Path, facts: Mapping[str, Any]) -> None:
    """Adds the environment of a session to those of the sessions before it. A file that is damaged is begun anew."""
    path = folder / ENVIRONMENT
    sessions = [*sessions_in(path), plain_or_named(facts)]
    write_text(path, json.dumps({SESSIONS: sessions}, indent=1, ensure_ascii=False) + "\n")


def sessions_in(path: Path) -> list[Any]:
    """The sessions in such a file; none if it is not there or cannot be read."""
    try:
        sessions = json.loads(path.read_bytes())[SESSIONS]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    return sessions if isinstance(sessions, list) else []
