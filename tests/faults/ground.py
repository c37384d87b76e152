"""What a run without a fault is made of: a tiny model, prompts, a reward function, and the fields of its run file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from faults.harness import Fault, scorer
from support import tiny

OPTIONS: dict[str, Any] = dict(
    model_name_or_path="./policy",
    dataset_name="data.jsonl",
    reward_funcs=["feedback.py:words"],
    output_dir="out",
    use_cpu=True,
    report_to="none",
    save_strategy="steps",
    save_steps=100,
    logging_steps=1,
    max_steps=4,
    learning_rate=0.01,
    lr_scheduler_type="constant",
    per_device_train_batch_size=2,
    num_completions=2,
    max_new_tokens=4,
    max_length=32,
    gradient_checkpointing=False,
)
FEEDBACK = scorer()


def run_file(options: dict[str, Any]) -> str:
    return yaml.safe_dump({k: v for k, v in {**OPTIONS, **options}.items() if v is not None}, sort_keys=False)


def write_files(folder: Path, fault: Fault, url: str) -> None:
    """The files of a run with a fault; `policy` and `data.jsonl` are there already."""
    texts = {"feedback.py": FEEDBACK, "run.yaml": run_file(fault.options), **fault.files}
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.replace("{url}", url).encode())


def make_ground(folder: Path) -> Path:
    """A folder with the model and the prompts, which the folders of runs are copied from."""
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = tiny.causal_lm("llama", sharpness=1.0, num_key_value_heads=1, **shape)
    model.save_pretrained(folder / "policy")
    tiny.tokenizer(chat=True).save_pretrained(folder / "policy")
    rows = [json.dumps({"prompt": prompt.content}) for prompt in tiny.prompts([4, 3, 5, 4, 6, 4, 3, 5])]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    return folder
