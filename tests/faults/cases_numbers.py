"""Numbers that no run can use, in a run file and on the command line; each is one line that names the field."""

from __future__ import annotations

from typing import Any

import yaml

from faults.ground import run_file
from faults.harness import Fault, OneLine

IN_FILE: dict[str, list[Any]] = {
    "learning_rate": [float("nan"), float("inf"), "1e400", 1e9, -1, 0, True, "fast"],
    "beta": [float("inf"), [0.1, float("nan")], float("nan"), 1e308, 1e12, -0.1, 0],
    "temperature": [float("inf"), float("nan"), 0, -1, 1e9, "hot"],
    "top_p": [float("nan"), 1.5, 0, -0.1],
    "top_k": [-1, 10**30],
    "min_p": [2, float("nan"), -0.5],
    "repetition_penalty": [0, float("inf"), float("nan"), -1],
    "max_grad_norm": [float("nan"), -1],
    "warmup_steps": [-1, float("inf"), float("nan")],
    "weight_decay": [float("inf"), float("nan"), -1, 1e308],
    "adam_epsilon": [float("nan"), 5],
    "num_completions": [1, 10**30, 0, -2],
    "max_new_tokens": [0, 10**30, -5, 10**15],
    "max_length": [-1, 10**30, 2],
    "per_device_train_batch_size": [0, 10**12, -1],
    "gradient_accumulation_steps": [10**12, 0, -1],
    "max_steps": [0, 10**30, -5],
    "save_steps": [-1, 10**30, float("nan")],
    "logging_steps": [-1, float("nan")],
    "seed": [-1, 10**30, 2**65, float("nan")],
    "rollout_batch_size": [0, 10**30],
    "max_tokens_per_pass": [0, -1],
    "max_idle_steps": [0, -1],
    "max_skipped_steps": [-1],
    "skipped_step_lr_factor": [0, 2, float("nan"), -1],
    "max_failure_share": [-0.1, float("nan"), 2],
    "missing_eos_penalty": [-1, float("inf"), float("nan")],
    "label_temperature": [0, float("nan"), -1],
    "target_kl": [float("inf"), -1],
    "reward_weights": [[float("nan")], [float("inf")], [], [1, 2, 3]],
    "reward_timeout": [float("nan"), 0, -1],
    "save_total_limit": [-2, 10**30],
    "dataloader_num_workers": [-1, 10**6],
    "lora_r": [0, -1, 10**9],
    "lora_alpha": [float("nan"), 0],
    "lora_dropout": [float("nan"), 1],
}
"""Some values of each field; `tests/unit/config/test_absurd_numbers.py` goes through all fields."""
WRITTEN = {"learning_rate": "1.0e+30", "num_completions": "2.5", "max_new_tokens": "1e9999", "seed": "1e30"}
"""Ways of YAML to write a number."""
ON_COMMAND_LINE = {
    "--learning_rate": ["nan", "1e400", ".inf", "-1e308", "yes"],
    "--beta": ["1e308", "nan"],
    "--max_steps": ["1e30", "0", "two"],
    "--temperature": [".nan", "1e400"],
    "--num_completions": ["2.5", "1000000000000000000000000000000"],
}
QUICK = 2
"""Values of a field that the short list has."""

FAULTS = [
    *(
        Fault(
            "numbers",
            f"{name}: {value}"[:60],
            OneLine(2, f"`{name}`"),
            options={name: value} | beside,
            quick=place < QUICK,
        )
        for name, values in IN_FILE.items()
        for place, value in enumerate(values)
        for beside in [{"use_peft": True} if name.startswith("lora") else {}]
    ),
    *(
        Fault(
            "numbers",
            f"{name}: {value}, in YAML",
            OneLine(2, f"`{name}`"),
            files={"run.yaml": yaml.safe_dump(yaml.safe_load(run_file({})) | {name: "HERE"}).replace("HERE", value)},
        )
        for name, value in WRITTEN.items()
    ),
    *(
        Fault(
            "numbers",
            f"{word}={value}"[:60],
            OneLine(2, f"`{word[2:]}`"),
            words=(f"{word}={value}",),
            quick=place < 1,
        )
        for word, values in ON_COMMAND_LINE.items()
        for place, value in enumerate(values)
    ),
    Fault(
        "numbers",
        "more tokens than the model has",
        OneLine(2, "max"),
        options=dict(max_length=100_000, max_new_tokens=90_000),
    ),
]
