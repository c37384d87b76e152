"""Checks of groups of fields of the configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from online_dpo.config.registry import known_names, nearest
from online_dpo.distributed.processes import SLURM, start_alone, started_together

if TYPE_CHECKING:
    from online_dpo.config.trainer_config import OnlineDPOConfig


EPOCH_FIELDS = ("beta", "xpo_alpha", "mixture_coef")
"""Fields that may hold a number for each epoch."""
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def check_ranges(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: a number is out of range.
    """
    sampling = {name: getattr(args, name) for name in SAMPLING_FIELDS}
    given: dict[str, Any] = {**(args.generation_kwargs or {})}  # pyright: ignore[reportGeneralTypeIssues]
    sampling |= {name: value for name, value in given.items() if name in SAMPLING_FIELDS}
    betas, alphas, shares = (epoch_values(getattr(args, name)) for name in EPOCH_FIELDS)
    checks = [
        (args.max_steps > 0 or args.num_train_epochs > 0, "num_train_epochs", "above 0"),
        (args.num_completions >= 2, "num_completions", "at least 2: a pair needs two completions"),
        (args.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
        (args.max_prompt_length is None or args.max_prompt_length >= 1, "max_prompt_length", "at least 1"),
        (sampling["temperature"] > 0, "temperature", "above 0: completions of one prompt have to differ"),
        (0 < sampling["top_p"] <= 1, "top_p", "in (0, 1]"),
        (sampling["top_k"] >= 0, "top_k", "0 (off) or more"),
        (sampling["min_p"] is None or 0 <= sampling["min_p"] <= 1, "min_p", "in [0, 1]"),
        (sampling["repetition_penalty"] > 0, "repetition_penalty", "above 0"),
        (args.rollout_batch_size >= 1, "rollout_batch_size", "at least 1"),
        (args.reward_batch_size >= 1, "reward_batch_size", "at least 1"),
        (args.max_staleness >= 0, "max_staleness", "0 or more"),
        (args.resample_rounds >= 0, "resample_rounds", "0 or more"),
        (args.sync_check_steps >= 0, "sync_check_steps", "0 or more"),
        (args.max_tokens_per_pass is None or args.max_tokens_per_pass >= 1, "max_tokens_per_pass", "at least 1"),
        (args.max_skipped_steps >= 1, "max_skipped_steps", "at least 1"),
        (args.overoptimisation_patience >= 1, "overoptimisation_patience", "at least 1"),
        (_all(beta > 0 for beta in betas), "beta", "above 0, or a list of such numbers"),
        (_all(0 <= alpha < math.inf for alpha in alphas), "xpo_alpha", "0 or more, or a list of such numbers"),
        (_all(0 <= share <= 1 for share in shares), "mixture_coef", "in [0, 1], or a list of such numbers"),
        (args.target_kl is None or 0 < args.target_kl < math.inf, "target_kl", "above 0"),
        (1 < args.beta_range < math.inf, "beta_range", "above 1"),
        (0 < args.beta_gain < 5, "beta_gain", "above 0 and below 5, so that beta stays above 0"),
    ]
    check_numbers(args, checks, sampling)
    if args.prompt_limit is not None and args.prompt_limit < 1:
        raise ValueError(
            f"`max_length` ({args.max_length}) leaves no room for a prompt beside `max_new_tokens` "
            f"({args.max_new_tokens}). Raise `max_length` or lower `max_new_tokens`."
        )


def check_choices(args: OnlineDPOConfig, choices: Sequence[tuple[str, Sequence[str]]]) -> None:
    """
    Raises:
        ValueError: a field, or an item of one that may be a list, is none of those that it may be.
    """
    for name, built_in in choices:
        value, allowed = getattr(args, name), known_names(name, built_in)
        if value is None and getattr(type(args), name) is None:
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item not in allowed:
                hint = nearest(str(item), allowed)
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; it is {item!r}.{hint}")


def check_processes(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: several processes were started, and do not work together: each would train alone, into one folder.
    """
    started = started_together()
    if started is None or args.world_size == started.count:
        return
    if args.device.type == "cpu" and not args.use_cpu and started.variable != SLURM:
        remedy = "On a CPU they work together with `use_cpu: true` (`--use_cpu`, `use_cpu=True`)."
    else:
        remedy = f"To train together, start them with `torchrun --nproc_per_node {started.count}`."
    raise ValueError(
        f"{started.count} processes were started ({started.variable}), but this one trains as one of "
        f"{args.world_size}, into the same folder as the others. {remedy} If each is a run of its own: "
        f"{start_alone(started)[0].lower()}{start_alone(started)[1:]}"
    )


def epoch_values(value: float | Sequence[float]) -> list[float]:
    """A field that holds a number, or one for each epoch, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]  # pyright: ignore[reportReturnType]


def _all(holds: Iterable[bool]) -> bool:
    """Whether there is one at least, and all hold."""
    found = list(holds)
    return bool(found) and all(found)


def check_numbers(
    args: OnlineDPOConfig, checks: Sequence[tuple[bool, str, str]], values: Mapping[str, Any] | None = None
) -> None:
    """Each check: whether it holds, the field, and what the field must be. ``values`` has those that differ from it."""
    for holds, name, wanted in checks:
        if not holds:
            value = (values or {}).get(name, getattr(args, name))
            raise ValueError(f"`{name}` must be {wanted}; it is {value!r}.")
