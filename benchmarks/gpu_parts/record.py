"""What `benchmarks/gpu.py` has found so far: a JSON file and a page of the same name, written after each part."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CODE = ("src", "benchmarks", "tests/gpu", "tests/support")
"""What decides a part's figures, beside the machine and the packages."""
DONE = ("ok", "not here")
"""Statuses that are no failure. What is not here is asked for again by the next call."""
LINES_SHOWN = 40
WIDEST = 400


def code_digest() -> str:
    """A digest of all Python files that parts run: equal where there is no git, and when only a page was committed."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit that is checked out, with a mark where files have been changed since; "none" outside of git."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:  # a machine without git
        return "none"
    return done.stdout.strip() if done.returncode == 0 else "none"


@dataclass
class Record:
    """All that is known of one machine. Each part's entry has its ``status`` ("ok", "failed", "timed out" or "not
    here"), and what it has written, or the last lines that it has said.

    Args:
        path: of the JSON file; the page stands beside it.
        facts: about the machine and the code.
    """

    path: Path
    facts: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path, facts: dict[str, Any]) -> Record:
        """The record of an earlier call at this path, with the facts of now, or a new one."""
        parts = json.loads(path.read_text())["parts"] if path.exists() else {}
        return cls(path, facts, parts)

    def is_done(self, name: str) -> bool:
        """Whether a part needs no repetition: it has passed, with the same code, packages and kind of machine."""
        entry = self.parts.get(name)
        same = ("code", "device", "dry_run", "versions")
        return entry is not None and entry["status"] == "ok" and all(entry[key] == self.facts[key] for key in same)

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Notes what a part has given, and writes both files."""
        same = ("code", "commit", "device", "dry_run", "versions")
        self.parts[name] = {key: self.facts[key] for key in same} | entry
        self.write()

    def write(self) -> None:
        """Writes both files, each at once: whoever reads or kills meanwhile finds the old or the new one."""
        text = json.dumps({"facts": self.facts, "parts": self.parts}, indent=1) + "\n"
        for path, content in ((self.path, text), (self.page, "\n".join(self.lines()) + "\n")):
            part = path.with_name(path.name + ".part")
            part.write_text(content)
            os.replace(part, path)

    @property
    def page(self) -> Path:
        return self.path.with_suffix(".md")

    def lines(self) -> list[str]:
        """The page."""
        facts = self.facts
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
        out = [f"# {facts['device']}", ""]
        out += ["A rehearsal with tiny models: its figures mean nothing.", ""] if facts["dry_run"] else []
        out += [f"Commit {facts['commit']} (code {facts['code']}); {versions}."]
        out += [f"{facts['state']}", "", "| part | | seconds |", "|---|---|---:|"]
        out += [f"| {name} | {entry['status']} | {entry['seconds']:.0f} |" for name, entry in self.parts.items()]
        for name, entry in self.parts.items():
            out += ["", f"## {name}", "", entry["shows"], ""]
            if entry["code"] != facts["code"]:
                out += [f"Measured with other code: commit {entry['commit']} (code {entry['code']}).", ""]
            out += [f"`{entry['command']}`, {entry['seconds']:.0f} s. {entry['state']}", ""]
            for table in entry["tables"]:
                out += markdown(table)
            if entry["status"] not in DONE or not entry["tables"]:
                out += [f"{entry['status']}:" if entry["status"] != "ok" else "", "", *quoted(entry["last_lines"])]
        return out


def markdown(table: dict[str, Any]) -> list[str]:
    """The lines of a table: ``title``, ``columns``, ``rows`` and ``notes``. Numbers stand on the right."""
    columns, rows = table["columns"], table["rows"]
    numeric = [bool(rows) and all(isinstance(row[c], int | float | None) for row in rows) for c in range(len(columns))]
    lines = [f"### {table['title']}", "", "| " + " | ".join(columns) + " |"]
    lines += ["|" + "|".join("---:" if right else "---" for right in numeric) + "|"]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return [*lines, "", *(f"{note}\n" for note in table["notes"])]


def cell(value: Any) -> str:
    """A value in four digits at most; "-" for none.

    >>> cell(0.123456), cell(12345.6), cell(None), cell("a|b")
    ('0.1235', '12346', '-', 'a/b')
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")


def quoted(text: str) -> list[str]:
    """Text as a block of the page, as it is."""
    lines = [line[:WIDEST] for line in text.splitlines() if line.strip()]
    return ["~~~", *lines, "~~~", ""]


def table(title: str, columns: list[str], rows: list[list[Any]], *notes: str) -> dict[str, Any]:
    """A table as parts write it."""
    assert all(len(row) == len(columns) for row in rows)
    return {"title": title, "columns": columns, "rows": rows, "notes": list(notes)}


def write_tables(path: Path, tables: list[dict[str, Any]], **values: Any) -> None:
    """What a part has measured so far: it is called again when there is more, so that a part that is killed leaves it.

    Args:
        values: figures that a reader of the JSON file wants, beside the tables.
    """
    path.write_text(json.dumps({"tables": tables, "values": values}) + "\n")
