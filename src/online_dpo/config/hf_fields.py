"""Checks of fields of transformers that it looks at late: when a model is loaded already, or in mid-run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import GenerationConfig, Trainer, get_scheduler

from online_dpo.config.checking import check_choices, check_numbers
from online_dpo.config.requirements import problems
from online_dpo.foreign import foreign

if TYPE_CHECKING:
    from online_dpo.config.trainer_config import OnlineDPOConfig

OPTIMIZERS_OF_A_MODEL = ("galore", "apollo")
"""What the names of optimizers begin with that cannot be made without the model's layers."""
STEPS = 100  # of a run that is only thought of; schedules go by shares of it


def check_names(args: OnlineDPOConfig) -> None:
    """Before transformers reads the fields.

    Raises:
        ValueError: a field has a name that nothing has, needs a package that is not installed, or asks for what this
            version does not do.
    """
    if args.deepspeed is not None:
        raise ValueError("`deepspeed` is not in this version. Use several processes without it (torchrun).")
    # vLLM is looked for by the trainer, that a configuration can be made where it is not
    for _, problem in problems({**vars(args), "use_vllm": False, "engine": None}):
        raise ValueError(problem)
    backends = tuple(backend.value.lower() for backend in DynamoBackend)
    if args.torch_compile_backend is not None:
        check_choices(args, [("torch_compile_backend", backends)])


def check_training(args: OnlineDPOConfig) -> None:
    """Once transformers has read them.

    Raises:
        ValueError: a number is out of range, or optimizer, schedule or options of sampling cannot be made as asked.
    """
    check_numbers(
        args,
        [
            (args.per_device_train_batch_size >= 1, "per_device_train_batch_size", "at least 1"),
            (args.per_device_eval_batch_size >= 1, "per_device_eval_batch_size", "at least 1"),
            (args.gradient_accumulation_steps >= 1, "gradient_accumulation_steps", "at least 1"),
            (args.dataloader_num_workers >= 0, "dataloader_num_workers", "0 or more"),
            (args.max_grad_norm >= 0, "max_grad_norm", "0 (off) or more"),
        ],
    )
    if args.torch_compile and args.torch_compile_mode is not None:
        modes = tuple(torch._inductor.list_mode_options())
        check_choices(args, [("torch_compile_mode", modes)])
    for _, problem in problems({"model_init_kwargs": args.model_init_kwargs}):
        raise ValueError(problem)
    _check_optimizer(args)
    options = {**(args.generation_kwargs or {})}  # pyright: ignore[reportGeneralTypeIssues]
    with foreign("`generation_kwargs` or `cache_implementation`: GenerationConfig", raises=ValueError):
        GenerationConfig(**{"do_sample": True, "cache_implementation": args.cache_implementation, **options})
    stops = options.get("stop_strings")
    if not isinstance(stops, (str, list, tuple, type(None))):
        raise ValueError(f"`generation_kwargs`: `stop_strings` must be a text or a list of texts; it is {stops!r}.")


def _check_optimizer(args: OnlineDPOConfig) -> None:
    """Makes the optimizer and the schedule, of a single number."""
    if args.optim.startswith(OPTIMIZERS_OF_A_MODEL):
        return
    name = getattr(args.optim, "value", args.optim)
    with foreign(f"The optimizer `{name}` cannot be made with these settings: it", raises=ValueError):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([nn.Parameter(torch.zeros(1))], **options)
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    with foreign(f"The schedule `{name}` cannot be made with these settings: it", raises=ValueError):
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(STEPS),
            num_training_steps=STEPS,
            scheduler_specific_kwargs={**(args.lr_scheduler_kwargs or {})},  # pyright: ignore[reportGeneralTypeIssues]
        )


def check_output_dir(args: OnlineDPOConfig) -> None:
    """
    Raises:
        ValueError: nothing can be written there.
    """
    folder = Path(str(args.output_dir)).absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"`output_dir` is {args.output_dir}, but {existing} is no folder. Give another one.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` is {args.output_dir}, but nothing can be written in {existing}. Give another.")
