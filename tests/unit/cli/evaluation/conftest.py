"""A working folder with all that `online-dpo eval` needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import tiny
from support.eval_folders import LENGTHS, REWARDS, save


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with two models, prompts and reward functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, seed in (("policy", 0), ("other", 5)):
        save(name, tiny.causal_lm(seed=seed, sharpness=1.0))
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p.content}) for p in tiny.prompts(LENGTHS)))
    Path("rewards.py").write_text(REWARDS)
    return tmp_path
