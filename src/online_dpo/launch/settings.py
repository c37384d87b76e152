"""The section ``ray`` of a run file: how many processes are started on a Ray cluster, and with what.

``schema.py`` reads this file's text, so each field is documented once, beneath it. Nothing heavy may be imported here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

STARTED_AS = "ONLINE_DPO_STARTED_AS"
"""The environment variable in which processes on a cluster find the words of the command that started them all."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
OWN_OPTIONS = {
    "--host": "the address of its node",
    "--port": "a free one",
    "--without-key": "a key is made for each start",
}
"""Options of ``online-dpo serve`` that are chosen here, and what they are."""


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """What ``online-dpo ray`` starts, and where."""

    # --- ray --------------------------------------------------------------------------------------------------------

    address: str | None = None
    """Address of the cluster, such as `auto` (the one that this machine belongs to) or `10.0.0.1:6379`. When not set:
    that in the environment variable RAY_ADDRESS, else the cluster that this machine belongs to, else a new one on this
    machine alone, which ends with the run."""

    train_gpus: int = 0
    """Processes that train, each on a GPU of its own. Either this or `train_workers`."""

    train_workers: int = 0
    """Processes that train on CPUs."""

    cpus_per_trainer: int = 1
    """CPU cores that are reserved for each process that trains. It computes with as many threads, unless
    OMP_NUM_THREADS is set."""

    servers: int = 0
    """vLLM servers (`online-dpo serve`) that are started for the run, with the model of `model_name_or_path`. The run
    then samples from them; its own `use_vllm`, `vllm_mode` and `vllm_server_base_url` need not be given."""

    gpus_per_server: int | None = None
    """GPUs of each server, over which it splits the model unless `server_args` gives `--data-parallel-size`. They are
    all on one machine. When not set: 1 with `train_gpus`, 0 with `train_workers`."""

    cpus_per_server: int = 1
    """CPU cores that are reserved for each server."""

    server_args: list[str | int | float] | None = None
    """More words for `online-dpo serve`, such as `[--max-model-len, 4096, --lora-rank, 16, --, --enforce-eager]`."""

    max_restarts: int = 3
    """How often all processes that train are started again from the last checkpoint after one of them was lost; and how
    often each server is."""

    placement_timeout: float = 120.0
    """Seconds in which the cluster has to have room for all processes, at the start and after a machine was lost."""

    server_start_timeout: float = 900.0
    """Seconds in which a server has to answer after it was started: it loads the model first."""

    stop_timeout: float = 300.0
    """Seconds that processes have after Ctrl-C or SIGTERM to save a checkpoint and end, before they are killed."""

    env_vars: list[str] | None = None
    """Names of more environment variables that all processes get as they are here, such as `[MY_TOKEN, LD_*]`. Those of
    Hugging Face, torch, NCCL, gloo, vLLM, OpenMP, trackers and API keys, and PYTHONPATH, are passed on anyway."""

    @property
    def trainers(self) -> int:
        """The number of processes that train."""
        return self.train_gpus or self.train_workers

    @property
    def server_words(self) -> list[str]:
        """`server_args` as the words that they are."""
        return list(map(str, self.server_args or []))

    @property
    def server_gpus(self) -> int:
        """The number of GPUs of each server."""
        return int(self.train_gpus > 0) if self.gpus_per_server is None else self.gpus_per_server


COUNTS = (
    *("train_gpus", "train_workers", "cpus_per_trainer", "servers", "gpus_per_server", "cpus_per_server"),
    "max_restarts",
)
"""Fields that are 0 or more."""
SECONDS = ("placement_timeout", "server_start_timeout", "stop_timeout")
"""Fields that are above 0."""


def settings_problems(settings: RaySettings) -> Iterator[tuple[str, str]]:
    """Check the settings; yield for each problem the field and the rest of the message."""
    for name in COUNTS:
        value = getattr(settings, name)
        if value is not None and value < 0:
            yield name, f"is {value}; wanted: 0 or more."
    for name in SECONDS:
        value = getattr(settings, name)
        if not (0 < value < math.inf):
            yield name, f"is {value:g}; wanted: a number of seconds above 0."
    if settings.address is not None and not settings.address.strip():
        yield "address", "is empty. Give the address of a cluster, such as `auto` or `10.0.0.1:6379`."
    elif settings.address is not None and settings.address.startswith("ray://"):
        yield (
            "address",
            f"is {settings.address!r}: a run is not started through Ray's client. Start `online-dpo ray` on a machine "
            "of the cluster, or with `ray job submit`.",
        )
    for name in settings.env_vars or []:
        if _VARIABLE.fullmatch(name) is None:
            yield (
                "env_vars",
                f"has {name!r}; wanted: names of variables, such as MY_TOKEN or MY_*, without values.",
            )
    yield from _server_problems(settings)


def start_problems(settings: RaySettings) -> Iterator[tuple[str, str]]:
    """Check what a start needs, where the ranges are right; yield for each problem the field and the message's rest."""
    if settings.train_gpus and settings.train_workers:
        yield "train_workers", "is given beside `ray.train_gpus`. Give one of them: processes with GPUs, or with CPUs."
    if not settings.trainers:
        yield "train_gpus", "is 0. Give the number of GPUs to train on, or with CPUs alone `ray.train_workers`."
    if settings.train_workers and not settings.cpus_per_trainer:
        yield "cpus_per_trainer", "is 0; wanted: 1 or more with `ray.train_workers`."
    if settings.servers and not settings.server_gpus and not settings.cpus_per_server:
        yield "cpus_per_server", "is 0; wanted: 1 or more for servers without GPUs."


def _server_problems(settings: RaySettings) -> Iterator[tuple[str, str]]:
    words = settings.server_words
    before_cut = words[: words.index("--")] if "--" in words else words
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name in OWN_OPTIONS:
            yield "server_args", f"has `{name}`, which is chosen for each server: {OWN_OPTIONS[name]}. Leave it out."
    if before_cut and not before_cut[0].startswith("-"):
        yield "server_args", f"begins with {before_cut[0]!r}; the model is the run's. Give options only."
