"""Checks that all processes of a run do the same: settings, data, models and feedback."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol, runtime_checkable

from datasets import Dataset
from torch import nn

from online_dpo import __version__
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.collectives import check_same, world_size
from online_dpo.distributed.rank_watch import watch_ranks
from online_dpo.distributed.weights import is_sharded
from online_dpo.evaluation.gold import Gold
from online_dpo.modeling.fingerprint import weights_checksum
from online_dpo.modeling.reference import Reference
from online_dpo.scoring.protocols import PairwiseScorer, PointwiseScorer

OF_PROCESS = ("output_dir", "logging_dir", "run_name", "local_rank", "log_level", "log_level_replica", "disable_tqdm")
"""Fields that may differ: they say where a process writes and what it shows."""

PACKAGES = ("torch", "transformers", "accelerate")
ROWS = 16
"""How many rows of a dataset stand for all of them."""


@runtime_checkable
class OwnsModel(Protocol):
    """A scorer or a judge with a model in this process."""

    name: str
    model: nn.Module


def same_settings(args: OnlineDPOConfig) -> OnlineDPOConfig:
    """Returns the configuration if all ranks have the same, and the same versions of packages. From here on, ranks are
    watched. A collective operation.

    Raises:
        ValueError: on every rank, if one has another value in any field.
    """
    watch_ranks(args.ddp_timeout)
    settings = {name: _text(value) for name, value in args.to_dict().items() if name not in OF_PROCESS}
    check_same(settings, "settings")
    own = {"online-dpo": __version__, "python": platform.python_version()}
    check_same(own | {name: version(name) for name in PACKAGES}, "packages")
    return args


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


def check_same_models(
    policy: nn.Module,
    reference: Reference,
    sources: Sequence[PointwiseScorer | PairwiseScorer],
    gold: Gold | None = None,
) -> None:
    """Checks policy, reference, reward models and models of judges by all of their weights, and other scorers and
    judges by their names; those that are sharded, before they are (`check_same_weights`). A collective
    operation. DDP would give all ranks the first one's policy, but no other model.

    Raises:
        ValueError: on every rank, if one has another model or scorer.
    """
    if world_size() == 1:
        return
    named = {"policy": policy, "reference": reference.model}
    facts = {"scorers": ", ".join(source.name for source in sources)}
    for what, some in {"scorer": sources, "gold scorer": [] if gold is None else gold.sources}.items():
        models = [source for source in some if isinstance(source, OwnsModel)]
        named |= {f"{what} {number} ({source.name})": source.model for number, source in enumerate(models)}
    facts |= {name: _described(model) for name, model in named.items() if model is not None and not is_sharded(model)}
    check_same(facts, "models and scorers")


def check_same_weights(model: nn.Module, name: str) -> None:
    """Checks a whole model before it is sharded: each rank keeps a part of its own weights, so that afterwards all have
    the same model, whatever it is. A collective operation.

    Raises:
        ValueError: on every rank, if one has another model.
    """
    if world_size() > 1:
        check_same({name: _described(model)}, "models and scorers")


def _described(model: nn.Module) -> str:
    return f"{type(model).__name__}, weights {weights_checksum(model)}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _text(value: Any) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # where an object lies differs from process to process
    return text if len(text) <= 60 else f"{text[:40]}... {_hash(text.encode())}"
