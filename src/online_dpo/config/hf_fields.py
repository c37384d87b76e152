"""Checks of fields of transformers that it would check late: after a model has been loaded, or while training.

Ranges of numbers are in `hf_ranges`; what is refused is in `unsupported`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, Trainer, TrainingArguments, get_scheduler

from online_dpo.config.checking import check_choice, check_numbers
from online_dpo.config.hf_ranges import RANGES, absurd, out_of_range
from online_dpo.config.input import number_fields
from online_dpo.config.requirements import problems
from online_dpo.distributed.processes import SLURM, start_alone, started_together
from online_dpo.foreign import foreign

OPTIMIZERS_OF_A_MODEL = ("galore", "apollo")
"""Beginnings of the names of optimizers that cannot be created without the model's layers."""
NEVER_UNSET = (
    "max_grad_norm",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
)
"""Numbers that a run computes with before transformers has looked at them."""
STEPS = 100
"""Steps of the run that a schedule is tried with; schedules go by shares of it."""


def check_names(args: TrainingArguments) -> None:
    """Check fields of transformers before it reads them: names, the packages that they need, and numbers.

    Raises:
        ValueError: a field has a name that nothing has, needs a package that is not installed, is out of range, or asks
            for what this version does not do.
    """
    # the trainer looks for vLLM, so that a configuration can be created where it is not installed
    for _, problem in problems({**vars(args), "use_vllm": False, "engine": None}):
        raise ValueError(problem)
    backends = tuple(backend.value.lower() for backend in DynamoBackend)
    if args.torch_compile_backend is not None:
        check_choice("torch_compile_backend", args.torch_compile_backend, backends)
    for name in NEVER_UNSET:
        if not isinstance(value := getattr(args, name), (int, float)):
            raise ValueError(f"`{name}` must be {RANGES[name].wanted}; it is {value!r}.")
    for name, problem in out_of_range(vars(args)):
        raise ValueError(f"`{name}` {problem}")
    check_absurd(args, {field.name for field in fields(TrainingArguments)})


def check_absurd(args: Any, names: Collection[str]) -> None:
    """Check that the numbers in these fields are such as a run can use, whatever the field (see `absurd`).

    Raises:
        ValueError: one is NaN, infinite, or above the largest number of its field.
    """
    for name, problem in absurd({name: getattr(args, name) for name in number_fields(type(args)) if name in names}):
        raise ValueError(f"`{name}` {problem}")


def check_hf_fields(args: Any) -> None:
    """Check fields of transformers once it has read them: optimizer, schedule and options of sampling.

    Raises:
        ValueError: nothing is to be trained, or one of these cannot be created as asked.
    """
    check_numbers(args, [(args.max_steps > 0 or args.num_train_epochs > 0, "num_train_epochs", "above 0")])
    if args.torch_compile and args.torch_compile_mode is not None:
        check_choice("torch_compile_mode", args.torch_compile_mode, tuple(torch._inductor.list_mode_options()))
    for _, problem in problems({"model_init_kwargs": args.model_init_kwargs}):
        raise ValueError(problem)
    _check_optimizer(args)
    options = {**(args.generation_kwargs or {})}  # pyright: ignore[reportGeneralTypeIssues]
    with foreign("`generation_kwargs` or `cache_implementation`: GenerationConfig", raises=ValueError):
        GenerationConfig(**{"do_sample": True, "cache_implementation": args.cache_implementation, **options})
    stops = options.get("stop_strings")
    if not isinstance(stops, (str, list, tuple, type(None))):
        raise ValueError(f"`generation_kwargs`: `stop_strings` must be a text or a list of texts; it is {stops!r}.")


def check_processes(args: TrainingArguments) -> None:
    """Check that processes which were started together also train together, and not each alone, into one folder.

    Raises:
        ValueError: each would train alone.
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


SCHEDULES_WITHOUT_SETTINGS = ("constant", "constant_with_warmup")
"""`get_scheduler` ignores what it is given for them."""


def _check_optimizer(args: TrainingArguments) -> None:
    """Create the optimizer and the schedule for a model of a single number."""
    if args.optim.startswith(OPTIMIZERS_OF_A_MODEL):
        return
    name = getattr(args.optim, "value", args.optim)
    with foreign(f"The optimizer `{name}` cannot be made with these settings: it", raises=ValueError):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([nn.Parameter(torch.zeros(1))], **options)
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if name in SCHEDULES_WITHOUT_SETTINGS and args.lr_scheduler_kwargs:
        raise ValueError(f"`lr_scheduler_kwargs` is given, but the schedule `{name}` has no settings. Leave it out.")
    with foreign(f"The schedule `{name}` cannot be made with these settings: it", raises=ValueError):
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(STEPS),
            num_training_steps=STEPS,
            scheduler_specific_kwargs={**(args.lr_scheduler_kwargs or {})},  # pyright: ignore[reportGeneralTypeIssues]
        )
        factors = (
            [f(step) for f in schedule.lr_lambdas for step in range(STEPS)] if isinstance(schedule, LambdaLR) else []
        )
    if not all(map(math.isfinite, factors)):
        raise ValueError(
            f"The schedule `{name}` gives a learning rate that is no finite number. Check `lr_scheduler_kwargs`, which "
            f"is {args.lr_scheduler_kwargs!r}."
        )


def check_output_dir(args: TrainingArguments) -> None:
    """Check that `output_dir` is a folder, or can become one.

    Raises:
        ValueError: a file is in the way.
    """
    folder = Path(str(args.output_dir)).absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"`output_dir` is {args.output_dir}, but {existing} is no folder. Give another one.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` is {args.output_dir}, but nothing can be written in {existing}. Give another.")
