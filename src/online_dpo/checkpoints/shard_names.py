"""The files of a checkpoint in which each process keeps its part of what the optimizer updates."""

from __future__ import annotations

from pathlib import Path

FILE = "shard-{rank}.safetensors"
"""What one process held: numbers of the trained weights, and of the optimizer's state for them."""
INDEX = "shards.json"
"""What all of them share; it stands in the checkpoints of sharded runs alone."""


def has_shards(folder: Path) -> bool:
    """Whether a checkpoint holds the optimizer's state in shards."""
    return (folder / INDEX).is_file()
