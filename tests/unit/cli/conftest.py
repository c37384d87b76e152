"""A working folder."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a reward function in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def brevity(completions, **_):\n    return [-len(c) for c in completions]\n")
    return tmp_path
