"""The files that hold a model's weights, checked by their headers: whole, fitting together, and of a type that a model
computes with. No tensor is read, so this takes milliseconds for a model of any size.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

LENGTH_BYTES = 8
LONGEST_HEADER = 100_000_000
"""What the safetensors library reads at most."""
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""The size of a number of each type, by the type's name in a header."""
AGAIN = "Copy or download it again."

Header = dict[str, dict[str, Any]]


class WrongWeights(ValueError):
    """The files of weights of a folder cannot be used. The message names the file."""


def tensors_in(folder: Path, name: str, quantised: bool) -> Header | None:
    """The descriptions of all tensors of a folder, by name; ``None`` if it has none in safetensors.

    Args:
        name: of the file, without its ending: ``model`` or ``adapter_model``.
        quantised: whether the model says how its quantised weights are read.

    Raises:
        WrongWeights: they are damaged, or of a type that no model computes with.
    """
    single, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
    if single.is_file():
        tensors = read_header(single)
    elif index.is_file():
        tensors = _read_shards(index)
    else:
        return None
    if not tensors:
        raise WrongWeights(f"{single.name if single.is_file() else index.name} holds no tensors.")
    if not quantised:
        _check_types(tensors)
    return tensors


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, and check that the file is as long as it says.

    Raises:
        WrongWeights: the file is cut short, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise WrongWeights(f"{path.name} is a pointer of git-lfs, without the weights. Run `git lfs pull` there.")
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        if size <= LENGTH_BYTES:
            raise WrongWeights(f"{path.name} is {'empty' if not size else 'cut short'}. {AGAIN}")
        if length > LONGEST_HEADER or start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
            raise WrongWeights(f"{path.name} is no safetensors file. {AGAIN}")
        if length > size - LENGTH_BYTES:
            raise WrongWeights(f"{path.name} is cut short: it ends within its header. {AGAIN}")
        file.seek(LENGTH_BYTES)
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise WrongWeights(f"{path.name} has a damaged header. {AGAIN}") from None
    if not isinstance(header, dict):
        raise WrongWeights(f"{path.name} has a damaged header. {AGAIN}")
    header.pop("__metadata__", None)
    _check_places(path, header, size - LENGTH_BYTES - length)
    return header


def _check_places(path: Path, header: dict[str, Any], data: int) -> None:
    """Check that the tensors fill the file's data, one after the other."""
    places = sorted((*_place(path, name, entry), name) for name, entry in header.items())
    end = 0
    for start, stop, name in places:
        if start != end:
            what = "overlaps another one" if start < end else "does not follow the one before it"
            raise WrongWeights(f"{path.name} has a damaged header: `{name}` {what}. {AGAIN}")
        end = stop
    if end != data:
        what = f"is cut short: {end - data} bytes are missing" if end > data else "is longer than its header says"
        raise WrongWeights(f"{path.name} {what}. {AGAIN}")


def _place(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends in the file's data."""
    try:
        shape, kind, (start, stop) = entry["shape"], entry["dtype"], entry["data_offsets"]
        numbers = math.prod(shape) if all(_is_count(length) for length in shape) else -1
        fits = _is_count(start) and _is_count(stop) and start <= stop
    except (KeyError, TypeError, ValueError):
        raise WrongWeights(f"{path.name} has a damaged header: `{name}` is not described. {AGAIN}") from None
    wanted = numbers * BITS[kind] if kind in BITS else (stop - start) * 8  # a type that is newer than this table
    if not fits or numbers < 0 or wanted != (stop - start) * 8:
        raise WrongWeights(f"{path.name} has a damaged header: the shape of `{name}` does not fit its place. {AGAIN}")
    return start, stop


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_shards(index: Path) -> Header:
    """The tensors of all shards that an index names."""
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        wanted = {str(name): str(file) for name, file in files.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise WrongWeights(f"{index.name} is damaged: it does not say which tensor is in which file. {AGAIN}") from None
    tensors: Header = {}
    for file in sorted(set(wanted.values())):
        if os.path.basename(file) != file or file in ("", ".", ".."):
            raise WrongWeights(f"{index.name} names {file!r}, which is not in the folder.")
        if not (index.parent / file).is_file():
            raise WrongWeights(f"{file} is missing, which {index.name} names. {AGAIN}")
        if not file.endswith(".safetensors"):
            raise WrongWeights(f"{index.name} names {file!r}, which is no safetensors file.")
        tensors |= read_header(index.parent / file)
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WrongWeights(f"{wanted[missing[0]]} lacks `{missing[0]}`{more}, which {index.name} promises. {AGAIN}")
    return tensors


def _check_types(tensors: Header) -> None:
    """Refuse matrices of 8 bits: without the scale that a quantiser keeps beside them, their numbers mean nothing."""
    for name, entry in tensors.items():
        if name.endswith(".weight") and len(entry["shape"]) > 1 and BITS.get(entry["dtype"], 32) <= 8:
            raise WrongWeights(
                f"`{name}` is of type {entry['dtype']}, and config.json has no `quantization_config` that says how its "
                "numbers are read. Give weights in bfloat16 or float32, or the config that belongs to them."
            )
