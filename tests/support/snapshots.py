"""All that can be seen of a model and of the process, as flat dictionaries that can be compared."""

from __future__ import annotations

import logging
import os
import random
import warnings

import datasets
import numpy as np
import torch
import transformers
from torch import nn

OF_MODULES = set(vars(nn.Module()))
A_MEMO_OF_TRANSFORMERS = "_previous_max_cache_length"  # how long the last static cache was, so that the next fits


def of_model(model: nn.Module) -> dict[str, object]:
    """Weights by value; requires_grad, dtype, mode, attributes, hooks and configs."""
    seen: dict[str, object] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen[f"{name}: weight"] = parameter.detach().clone()
        seen[f"{name}: requires_grad"] = parameter.requires_grad
        seen[f"{name}: kind"] = (parameter.dtype, parameter.device, id(parameter))
    for name, buffer in model.named_buffers():
        seen[f"{name}: buffer"] = buffer.clone()
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"{name}: training"] = module.training
        seen[f"{name}: modules"] = [(part, id(child)) for part, child in module.named_children()]
        for attribute, value in vars(module).items():
            if "hooks" in attribute:
                seen[f"{name}: {attribute}"] = list(value.values()) if hasattr(value, "values") else value
            elif attribute not in OF_MODULES and attribute != A_MEMO_OF_TRANSFORMERS:
                seen[f"{name}: {attribute}"] = _plain(value)
    configs = {"config": model.config, "generation_config": getattr(model, "generation_config", None)}
    configs |= {f"peft_config {name}": config for name, config in getattr(model, "peft_config", {}).items()}
    for name, config in configs.items():
        seen[name] = None if config is None else {key: _plain(value) for key, value in vars(config).items()}
    return seen


def of_process() -> dict[str, object]:
    """Random states, environment, warning filters, logging levels, torch's settings, progress bars."""
    loggers = {name: x for name, x in logging.root.manager.loggerDict.items() if isinstance(x, logging.Logger)}
    levels = {name: x.level for name, x in loggers.items() if x.level}  # modules that are imported meanwhile add some
    return {
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "torch": torch.get_rng_state(),
        "environment": dict(os.environ),
        "filters": list(warnings.filters),
        "formatwarning": (warnings.formatwarning, warnings.showwarning),
        "levels": {"": logging.root.level, **levels},
        "verbosity": (transformers.logging.get_verbosity(), datasets.logging.get_verbosity()),
        "torch settings": (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        ),
        "bars": (
            datasets.are_progress_bars_disabled(),
            transformers.utils.logging.is_progress_bar_enabled(),
        ),
    }


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    """The entries that differ, or that only one of the two has."""
    return {
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not _equal(before[name], after[name])
    }


def _plain(value: object) -> object:
    """Something comparable: values of plain types, the identity of all else."""
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype)):
        return value
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return id(getattr(value, "__func__", value))  # a bound method is a new object each time


def _equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
