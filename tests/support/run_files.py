"""Folders with a tiny policy, prompts and feedback in Python, run files in them, and their trainers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from online_dpo import OnlineDPOTrainer
from online_dpo.cli.runfile.run_file import plan_run
from online_dpo.cli.terminal.progress import ProgressDisplay
from online_dpo.cli.train import build_trainer
from support import tiny


def fill_folder(folder: Path, feedback: str, prompts: int = 8) -> Path:
    tiny.causal_lm(sharpness=1.0).save_pretrained(folder / "policy")
    tiny.tokenizer().save_pretrained(folder / "policy")
    rows = [json.dumps({"prompt": prompt.content}) for prompt in tiny.prompts([4] * prompts)]
    (folder / "data.jsonl").write_text("\n".join(rows))
    (folder / "feedback.py").write_text(feedback)
    return folder


def write_run_file(folder: Path, **fields: Any) -> Path:
    """One of such a folder; a field that is ``None`` is left out."""
    settings = dict(
        model_name_or_path="./policy",
        dataset_name="data.jsonl",
        output_dir=str(folder / "out"),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        max_steps=1,
        per_device_train_batch_size=8,
        max_new_tokens=8,
        max_length=64,
        num_completions=4,
        gradient_checkpointing=False,
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**settings, **fields}.items() if v is not None}))
    return path


def trainer_of(path: Path) -> OnlineDPOTrainer:
    return build_trainer(plan_run(path, []), ProgressDisplay())
