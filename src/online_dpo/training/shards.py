"""What an optimizer updates, in files: each process writes one, and any number of processes reads what it needs.

A parameter is one row of numbers here, whatever its shape. Each file holds, of some parameters, the numbers from a
start on: of the weight, and of each tensor that the optimizer keeps for it. FSDP2, ZeRO-1, 2, 3 and whole parameters
all split parameters into such pieces, so each can read what another one wrote. The files are safetensors and JSON:
reading them runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from online_dpo.checkpoints.codec import from_json, read_json, to_json, write_json
from online_dpo.checkpoints.shard_names import FILE, INDEX
from online_dpo.distributed.updated import Span, Updated
from online_dpo.errors import CheckpointError

WEIGHT = "weight"
PIECES = "pieces"
"""The entry of a file's header that says where its pieces begin."""
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Piece:
    """Where the numbers of a parameter in one file begin, and what the optimizer keeps for it that is one number."""

    start: int
    numel: int
    scalars: dict[str, float]


@dataclass(frozen=True)
class Shards:
    """What all files share. ``groups`` are the optimizer's settings of each group of parameters."""

    way: str
    processes: int
    optimizer: str
    groups: list[dict[str, Any]]
    scaling: dict[str, float]


def write(folder: Path, rank: int, updated: Updated) -> None:
    """Writes this process's file.

    Raises:
        CheckpointError: the optimizer keeps what is not one number for each weight, so that it cannot be split.
    """
    tensors: dict[str, torch.Tensor] = {}
    pieces: dict[str, Piece] = {}
    for tensor, spans in updated.tensors:
        rows, scalars = _rows_and_scalars(tensor, updated.optimizer.state.get(tensor, {}))
        for span in spans:
            pieces[span.name] = Piece(span.start, span.numel, scalars)
            for key, row in rows.items():
                own = row[span.offset : span.offset + span.numel]
                tensors[f"{key}/{span.name}"] = own.to("cpu", copy=True)
    header = {PIECES: json.dumps({name: to_json(piece) for name, piece in pieces.items()})}
    save_file(tensors, folder / FILE.format(rank=rank), metadata=header)


def _rows_and_scalars(
    tensor: torch.Tensor, state: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    rows, scalars = {WEIGHT: _row(tensor)}, {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == tensor.shape:
            rows[key] = _row(value)
        elif _is_scalar(value):
            scalars[key] = float(value)
        elif value is not None:
            raise CheckpointError(
                f"The optimizer keeps `{key}`, which is not one number for each weight, so that a sharded run cannot "
                "save it. Give another one, such as `optim: adamw_torch`"
            )
    return rows, scalars


def _row(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, as one row that shares its memory."""
    own = tensor.detach()
    return (own.to_local() if isinstance(own, DTensor) else own).view(-1)


def write_index(folder: Path, way: str, processes: int, updated: Updated) -> None:
    """Writes what all processes share."""
    groups = [{k: v for k, v in group.items() if _is_plain(v)} for group in updated.optimizer.param_groups]
    scaling = {name: float(value) for name, value in updated.scaling.items() if type(value) in (int, float)}
    write_json(folder / INDEX, Shards(way, processes, type(updated.optimizer).__name__, groups, scaling))


def read_index(folder: Path) -> Shards:
    """Reads what all processes share.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return read_json(folder / INDEX, Shards)


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(isinstance(v, PLAIN) for v in value))


@torch.no_grad()
def read(folder: Path, updated: Updated, weights_only: bool = False) -> None:
    """Reads what this process's optimizer updates, from the files of all processes that wrote them.

    Raises:
        CheckpointError: a file is missing or damaged, or they hold other weights than this run trains.
    """
    with ExitStack() as stack:
        files = Files(folder, read_index(folder).processes, stack)
        try:
            fill(updated, files, weights_only)
        except (SafetensorError, OSError, ValueError, TypeError) as problem:
            raise CheckpointError(f"A shard in {folder} is damaged ({problem}). Give another checkpoint.") from None


class Source(Protocol):
    """Whole parameters, and what an optimizer kept for them."""

    def keys(self, name: str) -> Sequence[str]:
        """Returns what there is of a parameter, each of which has one number for each of its weights.

        Raises:
            CheckpointError: nothing is known of it.
        """
        ...

    def scalars(self, name: str) -> Mapping[str, float]:
        """Returns what was kept for a parameter that is one number."""
        ...

    def numbers(self, key: str, span: Span) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the numbers of a span, in pieces, each with the place in the parameter at which it begins."""
        ...


@torch.no_grad()
def fill(updated: Updated, source: Source, weights_only: bool = False) -> None:
    """Fills the tensors of an optimizer, and its state, with what a source holds of them."""
    for tensor, spans in updated.tensors:
        for span in spans:
            keys = source.keys(span.name)
            for key in (key for key in keys if key == WEIGHT or not weights_only):
                for start, values in source.numbers(key, span):
                    own = span.offset + start - span.start
                    row = _row(_kept(updated.optimizer, tensor, key, values.dtype))
                    row[own : own + len(values)].copy_(values)
            for key, value in {} if weights_only else source.scalars(span.name).items():
                updated.optimizer.state[tensor][key] = _scalar(updated.optimizer, tensor, value)


class Files:
    """The files of all processes that wrote a checkpoint, opened, of which only what is asked for is read."""

    def __init__(self, folder: Path, processes: int, stack: ExitStack) -> None:
        self._folder = folder
        self._pieces: dict[str, list[tuple[Piece, Any]]] = {}
        self._keys: dict[str, dict[str, None]] = {}
        for path in (folder / FILE.format(rank=rank) for rank in range(processes)):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                for name, piece in json.loads(file.metadata()[PIECES]).items():
                    self._pieces.setdefault(name, []).append((from_json(Piece, piece), file))
            except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
                raise CheckpointError(f"{path} is missing or damaged ({problem}). Give another checkpoint.") from None
            for key, _, name in (name.partition("/") for name in file.keys()):  # noqa: SIM118
                self._keys.setdefault(name, {})[key] = None

    def keys(self, name: str) -> Sequence[str]:
        """Returns what there is of a parameter."""
        if name not in self._pieces:
            raise CheckpointError(f"{self._folder} holds nothing of `{name}`, which this run trains.")
        return [*self._keys[name]]

    def scalars(self, name: str) -> Mapping[str, float]:
        """Returns what was kept for a parameter that is one number."""
        return self._pieces[name][0][0].scalars

    def numbers(self, key: str, span: Span) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the numbers of a span; some may be in several files."""
        at, end = span.start, span.start + span.numel
        for piece, file in sorted(self._pieces[span.name], key=lambda item: item[0].start):
            until = min(end, piece.start + piece.numel)
            if piece.start <= at < until:
                yield at, file.get_slice(f"{key}/{span.name}")[at - piece.start : until - piece.start]
                at = until
        if at < end:
            raise CheckpointError(f"{self._folder} does not hold all of `{span.name}`. Give another checkpoint.")


class WholeState:
    """The optimizer's state of a run that was not sharded, as torch saves it: by the numbers of parameters.

    Args:
        path: of ``optimizer.pt``.
        names: the trained parameters, in the order in which an optimizer of whole ones has them.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
        if state and max(state) >= len(names):
            raise CheckpointError(f"{path} is of an optimizer with other parameters than this run trains.")
        self._state: dict[str, dict[str, Any]] = {name: state.get(place, {}) for place, name in enumerate(names)}

    def keys(self, name: str) -> Sequence[str]:
        """Returns what there is of a parameter; of the weight itself nothing."""
        return [key for key, value in self._state[name].items() if not _is_scalar(value)]

    def scalars(self, name: str) -> Mapping[str, float]:
        """Returns what was kept for a parameter that is one number."""
        return {key: float(value) for key, value in self._state[name].items() if _is_scalar(value)}

    def numbers(self, key: str, span: Span) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the numbers of a span at once."""
        yield span.start, self._state[span.name][key].view(-1)[span.start : span.start + span.numel]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def _kept(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, key: str, dtype: torch.dtype) -> torch.Tensor:
    """The tensor that an optimizer keeps under this key, which it makes in its first step."""
    if key == WEIGHT:
        return tensor
    state = optimizer.state[tensor]
    if key not in state:
        state[key] = torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
    return state[key]


def _scalar(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, value: float) -> Any:
    """A number as this optimizer keeps it: torch's own keep tensors, on the device if they compute with them there."""
    if not type(optimizer).__module__.startswith("torch."):
        return int(value) if value.is_integer() else value
    group = optimizer.param_groups[0]  # all have these settings alike
    on_device = group.get("capturable") or group.get("fused")
    return torch.tensor(value, dtype=torch.float32, device=tensor.device if on_device else "cpu")
