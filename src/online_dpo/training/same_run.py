"""Checks that all processes of a run do the same: settings, data, models and feedback."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from online_dpo.distributed.collectives import check_same

OF_PROCESS = ("output_dir", "logging_dir", "run_name", "local_rank", "log_level", "log_level_replica", "disable_tqdm")
"""Fields that may differ: they say where a process writes and what it shows."""

PACKAGES = ("online-dpo", "torch", "transformers", "accelerate")
ROWS, NUMBERS = 16, 32
"""How many rows of a dataset, and numbers of a weight, stand for all of them."""


def check_same_settings(args: TrainingArguments) -> None:
    """Checks the configuration and the versions of packages. A collective operation.

    Raises:
        ValueError: on every rank, if one has another value in any field.
    """
    settings = {name: _text(value) for name, value in args.to_dict().items() if name not in OF_PROCESS}
    check_same(settings, "settings")
    check_same({name: version(name) for name in PACKAGES} | {"python": platform.python_version()}, "packages")


def check_same_data(datasets: Mapping[str, Any]) -> None:
    """Checks datasets by their number of rows and some of these; a stream cannot be checked. A collective operation.

    Raises:
        ValueError: on every rank, if one has other data.
    """
    facts: dict[str, Any] = {}
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset):
            facts[f"rows of {name}"] = len(dataset)
            places = range(0, len(dataset), max(1, len(dataset) // ROWS))
            facts[f"text of {name}"] = _hash(repr([dataset[place] for place in places]).encode())
    check_same(facts, "data")


def check_same_models(models: Mapping[str, nn.Module], feedback: Mapping[str, str]) -> None:
    """Checks models by the shapes of their weights and some of their numbers, and scorers by their names. A collective
    operation. DDP would give all ranks the first one's policy, but not its reference.

    Raises:
        ValueError: on every rank, if one has another model or scorer.
    """
    check_same({**{name: weights_hash(model) for name, model in models.items()}, **feedback}, "models and scorers")


def weights_hash(model: nn.Module) -> str:
    """Returns a hash of names, shapes, types, whether they are trained, and the first numbers of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {weight.requires_grad}".encode())
        if weight.device.type != "meta":
            numbers = weight.detach().flatten()[:NUMBERS].contiguous().cpu()
            digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _text(value: Any) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # where an object lies differs from process to process
    return text if len(text) <= 60 else f"{text[:40]}... {_hash(text.encode())}"
