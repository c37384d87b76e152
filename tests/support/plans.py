"""Run files that tests write, and the problems of their plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.run_file import plan_run

GOOD = {
    "model_name_or_path": "owner/model",
    "dataset_name": "owner/data",
    "reward_funcs": "rewards.py:brevity",
    "output_dir": "out",
}


def write(path: Path, fields: dict | str) -> Path:
    path.write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields, sort_keys=False))
    return path


def problems_of(path: Path | None, *words: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        plan_run(path, words)
    return list(caught.value.problems)
