"""What a run needs of a checkpoint to go on from it: files by its options, and as many processes as have written it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.checkpoints.codec import from_json
from online_dpo.checkpoints.manifest import Manifest, has_manifest, manifest_of
from online_dpo.checkpoints.shard_names import INDEX

STATE = "trainer_state.json"
OF_OTHERS = ("global_step*", "pytorch_model_fsdp*")
"""The files of DeepSpeed and of accelerate."""
WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.safetensors", "adapter_model.bin", "*/adapter_model.safetensors", "*/adapter_model.bin"),
)
OPTIMIZER = ("optimizer.pt", INDEX)
SCHEDULER = ("scheduler.pt",)


@dataclass(frozen=True)
class SavedState:
    """What a resumed run computes with of `transformers.TrainerState`, which checks no types."""

    global_step: int
    epoch: float | None = 0.0
    max_steps: int = 0
    num_train_epochs: float = 0.0
    train_batch_size: int | None = None
    num_input_tokens_seen: int = 0
    total_flos: float = 0.0
    log_history: list[dict[str, Any]] | None = None
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    stateful_callbacks: dict[str, Any] | None = None


@dataclass(frozen=True)
class Needs:
    """The options of a run that decide what it reads from a checkpoint, and its number of processes.

    >>> Needs(options={"target_kl": 6.0, "max_staleness": 1}, world_size=2)
    """

    options: Mapping[str, Any]
    world_size: int

    @property
    def _anyway(self) -> bool:
        """Whether options may have changed since: their state then begins anew, and what was written is still whole."""
        return bool(self.options.get("resume_anyway"))

    def problem_of(self, folder: Path) -> str | None:
        """Why a run with these needs cannot go on from this checkpoint; ``None`` if it can."""
        return next(self._problems(folder), None)

    def _problems(self, folder: Path) -> Iterator[str]:
        if not (folder / INDEX).is_file() and (found := [path for name in OF_OTHERS for path in folder.glob(name)]):
            yield (
                f"{found[0].name} is of DeepSpeed's or accelerate's own format, pickles that could run any code, so it "
                "is not read. Start a run from the model that is saved there, if there is one"
            )
        for names, what in self._files(folder):
            if not any(any(folder.glob(name)) for name in names):
                yield f"{names[0]} is missing: {what}"
        for name, what in self._files_of_options(folder):
            if not (folder / name).is_file():
                yield f"{_missing(folder, name, what)}; `resume_anyway` goes on without it"
        yield from _state_problem(folder)
        yield from _shard_problem(folder)

    def _files(self, folder: Path) -> Iterator[tuple[tuple[str, ...], str]]:
        """Each file that must be there, or one of several, and what it holds."""
        yield (STATE,), "the steps done and their log"
        yield WEIGHTS, "the weights"
        only_model = " (with `save_only_model` a checkpoint cannot be resumed from)"
        yield OPTIMIZER, f"the optimizer's state{only_model}"
        yield SCHEDULER, "the state of the learning rate's schedule"
        for rank in range(0 if self._anyway else self._writers(folder)):
            name = "rng_state.pth" if self._writers(folder) == 1 else f"rng_state_{rank}.pth"
            yield (name,), f"the random state of process {rank}"

    def _writers(self, folder: Path) -> int:
        """The number of processes that have written files of their own."""
        return world_size_of(folder) or self.world_size

    def _files_of_options(self, folder: Path) -> Iterator[tuple[str, str]]:
        """Each file that only runs with an option write, and what it holds."""
        if self._anyway:
            return
        if self.options.get("target_kl") is not None:
            yield "beta.json", "beta, which `target_kl` adapts"
        if self.options.get("sync_ref_model"):
            yield "reference.safetensors", "the reference, which follows the policy with `sync_ref_model`"
        for rank in range(self._writers(folder) if self.options.get("max_staleness") else 0):
            yield f"lookahead-{rank}.json", "the completions that `max_staleness` samples ahead"

    def size_problem_of(self, folder: Path) -> str | None:
        """Why the number of processes does not fit; ``None`` if it does. Where a checkpoint says what its run computed
        with, the prompts of a step are compared instead, which the processes share.
        """
        written = world_size_of(folder)
        if written is None or written == self.world_size or self._anyway or _says_options(folder):
            return None
        return (
            f"{processes(written)} wrote it, and this run has {processes(self.world_size)}; each process goes on "
            f"from a random state and data of its own, so start {processes(written)}"
        )


def world_size_of(folder: Path) -> int | None:
    """The number of processes that wrote a checkpoint; ``None`` if nothing says it."""
    if has_manifest(folder):
        return Manifest.read(folder).world_size
    if (folder / "rng_state.pth").is_file():
        return 1
    return sum(re.fullmatch(r"rng_state_\d+\.pth", path.name) is not None for path in folder.iterdir()) or None


def _says_options(folder: Path) -> bool:
    manifest = manifest_of(folder)
    return manifest is not None and "options" in (manifest.extra.get("run") or {})


def _missing(folder: Path, name: str, what: str) -> str:
    former = Path(name).with_suffix(".pt")
    if (folder / former).is_file():
        return (
            f"{former} ({what}) is of an earlier version of online-dpo, a pickle that could run any code, so it is not "
            "read"
        )
    return f"{name} is missing: {what} (a run without this option does not write it)"


def _state_problem(folder: Path) -> Iterator[str]:
    try:
        state = from_json(SavedState, json.loads((folder / STATE).read_bytes()))
    except (ValueError, RecursionError):
        state = None
    if state is None or state.global_step < 0 or not math.isfinite(state.epoch or 0):
        yield f"{STATE} is damaged"


def _shard_problem(folder: Path) -> Iterator[str]:
    """The weights' files that an index names and that are not there."""
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            try:
                names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                yield f"{index.name} is damaged"
                return
            yield from (f"{name} is missing, which {index.name} names" for name in sorted(names - _names(folder)))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def processes(count: int) -> str:
    """Names a number of processes."""
    return "1 process" if count == 1 else f"{count} processes"
