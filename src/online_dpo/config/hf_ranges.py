"""Ranges of number fields that `transformers.TrainingArguments` does not check, and of LoRA's; and the largest number
that any field takes.

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
SEED = Range(at_least=0, below=2**32, wanted="from 0 to 2**32 - 1")
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
    "eval_delay": AT_LEAST_0,
    "torch_empty_cache_steps": AT_LEAST_1,
    "eval_accumulation_steps": AT_LEAST_1,
    "save_total_limit": Range(at_least=0, also=(-1,), wanted="1 or more; 0 or -1 keeps all checkpoints"),
    "dataloader_num_workers": AT_LEAST_0,
    "dataloader_prefetch_factor": AT_LEAST_1,
    "ddp_bucket_cap_mb": AT_LEAST_1,
    "ddp_timeout": AT_LEAST_1,
    "seed": SEED,
    "data_seed": SEED,
    "lora_dropout": SHARE,
}

LARGEST_OF_ANY = 10**9
"""The largest number, and the largest of a list, that a field takes. As steps, rows or seconds it means "never"; above
it, memory is asked for that no machine has, and libraries fail with errors of their own.
"""
LARGEST: dict[str, int] = {
    # A step moves each weight by about the learning rate: weights are of the size of 1.
    **dict.fromkeys(("learning_rate", "weight_decay"), 100),
    **dict.fromkeys(("beta", "temperature", "repetition_penalty"), 1000),
    "adam_epsilon": 1,
    # These are multiplied with each other to the size of what is held in memory.
    **dict.fromkeys(("num_completions", "judge_top", "resample_rounds", "max_staleness"), 10_000),
    **dict.fromkeys(("max_new_tokens", "max_length", "max_prompt_length"), 10**8),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 10**6),
    **dict.fromkeys(("gradient_accumulation_steps", "rollout_batch_size", "reward_batch_size"), 10**6),
    **dict.fromkeys(("dataloader_num_workers", "dataset_num_proc", "vllm_tensor_parallel_size"), 1000),
    "dataloader_prefetch_factor": 10_000,
    "lora_r": 2**16,
    "lora_alpha": 10**6,
    **dict.fromkeys(("seed", "data_seed"), 2**32 - 1),
}
"""The largest number of fields for which that is less, or more."""
MOST_DIGITS = 30
MAY_BE_INFINITE = ("max_grad_norm",)
"""Fields in which infinity has a meaning: the gradient's norm is measured, and never clipped."""


def out_of_range(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields whose number is out of range, each with what is wrong."""
    for name, allowed in RANGES.items():
        value = values.get(name)
        if isinstance(value, (int, float)) and not allowed.holds(value):
            yield name, f"must be {allowed.wanted}; it is {shown(value)}."


def shown(value: float) -> str:
    """A number for a message; of a whole one with very many digits, how many."""
    if isinstance(value, float) or abs(value) < 10**MOST_DIGITS:
        return repr(value)
    return f"a number of about {round(value.bit_length() * math.log10(2))} digits"  # Python writes no more than 4300


def absurd(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields that hold a number no run can use, whatever the field: NaN, infinity, or one above the largest. Each
    with what is wrong. A list is looked through.

    >>> [*absurd({"beta": [0.1, 1e308], "max_margin": math.inf})]
    [('beta', 'must be at most 1000; it is 1e+308.'), ('max_margin', 'must be a finite number; it is inf.')]
    """
    for name, value in values.items():
        problems = (_absurdity(name, one) for one in (value if isinstance(value, (list, tuple)) else [value]))
        if problem := next(filter(None, problems), None):
            yield name, problem


def _absurdity(name: str, value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        may_be = name in MAY_BE_INFINITE and value > 0
        return None if may_be else f"must be a finite number; it is {value!r}."
    largest = LARGEST.get(name, LARGEST_OF_ANY)
    if abs(value) <= largest:
        return None
    return f"must be {f'at most {largest}' if value > 0 else f'at least -{largest}'}; it is {shown(value)}."
