"""Numbers that `transformers.TrainingArguments` takes as they come, and what they must be for a run to work.

Without these checks, torch refuses them after the models have been loaded, or a run does nothing. Nothing heavy may be
imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

AT_LEAST_1 = (lambda value: value >= 1, "at least 1")
AT_LEAST_0 = (lambda value: 0 <= value < math.inf, "0 or more")
SHARE = (lambda value: 0 <= value < 1, "0 or more, and below 1")

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (lambda value: 0 < value < math.inf, "above 0, and finite"),
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "max_steps": (lambda value: value == -1 or value >= 1, "1 or more, or -1 to go by epochs"),
    "weight_decay": AT_LEAST_0,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": AT_LEAST_0,
    "warmup_steps": AT_LEAST_0,
    "logging_steps": AT_LEAST_0,
    "save_steps": AT_LEAST_0,
    "eval_steps": AT_LEAST_0,
    "dataloader_num_workers": AT_LEAST_0,
    "seed": (lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1"),
    "lora_dropout": SHARE,
}


def out_of_range(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields whose number is out of range, each with what is wrong."""
    for name, (holds, wanted) in RANGES.items():
        value = values.get(name)
        if isinstance(value, (int, float)) and not holds(value):
            yield name, f"must be {wanted}; it is {value!r}."
