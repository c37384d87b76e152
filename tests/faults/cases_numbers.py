"""Numbers that no run can use, in a run file and on the command line; each is one line that names the field."""

from __future__ import annotations

from typing import Any

from faults.harness import Fault, OneLine

IN_FILE: dict[str, list[Any]] = {
    "learning_rate": [float("nan"), float("inf"), "1e400", 1e9, -1, 0, True],
    "beta": [float("inf"), [0.1, float("nan")], 1e308, -1, 0],
    "temperature": [float("inf"), float("nan"), 0, 1e9, "hot"],
    "top_p": [float("nan"), 1.5, -0.1],
    "top_k": [-1, 10**30],
    "min_p": [2, float("nan")],
    "repetition_penalty": [0, float("inf")],
    "max_grad_norm": [float("nan"), -1],
    "warmup_steps": [-1, float("inf")],
    "weight_decay": [float("inf"), 1e308],
    "adam_epsilon": [float("nan"), 5],
    "num_completions": [1, 10**30, -2],
    "max_new_tokens": [0, 10**30, -5],
    "max_length": [-1, 10**30, 2],
    "per_device_train_batch_size": [0, -1, 10**12],
    "gradient_accumulation_steps": [10**12, 0],
    "max_steps": [0, -5, 10**30],
    "save_steps": [-1, 10**30],
    "logging_steps": [-1, float("nan")],
    "seed": [-1, 10**30],
    "rollout_batch_size": [0, 10**30],
    "max_tokens_per_pass": [0, -1],
    "max_idle_steps": [0, -1],
    "skipped_step_lr_factor": [0, 2, float("nan")],
    "max_failure_share": [-0.1, float("nan"), 2],
    "missing_eos_penalty": [-1, float("inf")],
    "label_temperature": [0, float("nan")],
    "target_kl": [float("inf"), -1],
    "reward_weights": [[float("nan")], [float("inf")]],
    "dataloader_num_workers": [-1, 10**6],
    "save_total_limit": [-2, 10**30],
    "lora_r": [0, -1, 10**9],
    "lora_alpha": [float("nan"), 0],
    "lora_dropout": [float("nan"), 1],
}
"""Some values of each field; `tests/unit/config/test_absurd_numbers.py` goes through all fields."""
ON_COMMAND_LINE = {
    "--learning_rate": ["nan", ".inf", "1e400", "-1e308", "yes"],
    "--beta": ["1e308", "nan"],
    "--max_steps": ["0", "1e30", "two"],
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
            f"{word}={value}"[:60],
            OneLine(2, f"`{word[2:]}`"),
            words=(f"{word}={value}",),
            quick=place < QUICK,
        )
        for word, values in ON_COMMAND_LINE.items()
        for place, value in enumerate(values)
    ),
]
