"""Ranges of number fields that `transformers.TrainingArguments` does not check, and of LoRA's.

Without these checks, torch raises after the models have been loaded, or a run does nothing. They need no transformers,
so that the command line makes them first. What needs it is in `hf_fields`. Nothing heavy may be imported here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a field takes: those between the given ends, and those of ``also``.

    ``wanted`` says the same in words. ``below=math.inf`` means finite.
    """

    wanted: str
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[int, ...] = ()

    def holds(self, value: float) -> bool:
        """Whether a number is one of them. NaN is in no range."""
        return value in self.also or (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


AT_LEAST_1 = Range(at_least=1, wanted="at least 1")
AT_LEAST_0 = Range(at_least=0, below=math.inf, wanted="0 or more")
ABOVE_0 = Range(above=0, below=math.inf, wanted="above 0, and finite")
SHARE = Range(at_least=0, below=1, wanted="0 or more, and below 1")

RANGES = {
    "learning_rate": ABOVE_0,
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "max_steps": Range(at_least=1, also=(-1,), wanted="1 or more, or -1 to go by epochs"),
    "max_grad_norm": Range(at_least=0, wanted="0 (off) or more"),
    "weight_decay": AT_LEAST_0,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": AT_LEAST_0,
    "warmup_steps": AT_LEAST_0,
    "logging_steps": AT_LEAST_0,
    "save_steps": AT_LEAST_0,
    "eval_steps": AT_LEAST_0,
    "dataloader_num_workers": AT_LEAST_0,
    "seed": Range(at_least=0, below=2**32, wanted="from 0 to 2**32 - 1"),
    "ddp_timeout": Range(at_least=1, below=10**9, wanted="from 1 to 10**9 seconds"),
    "lora_dropout": SHARE,
}


def out_of_range(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields whose number is out of range, each with what is wrong."""
    for name, allowed in RANGES.items():
        value = values.get(name)
        if isinstance(value, (int, float)) and not allowed.holds(value):
            yield name, f"must be {allowed.wanted}; it is {value!r}."
