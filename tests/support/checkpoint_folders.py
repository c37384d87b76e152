"""Folders that look like a run's checkpoints, without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from online_dpo.checkpoints.manifest import Manifest, entries_of, files_in

FILES = {
    "model.safetensors": "weights",
    "optimizer.pt": "moments",
    "scheduler.pt": "rate",
    "rng_state.pth": "random",
    "guard.json": "{}",
}


def whole_checkpoint(
    run_dir: Path,
    step: int,
    sequence: int | None = None,
    world_size: int = 1,
    manifest: bool = True,
    without: tuple[str, ...] = (),
    folder: Path | None = None,
    **fields: Any,
) -> Path:
    """``checkpoint-STEP`` in a folder, or ``folder``. Further fields are those of its manifest."""
    folder = folder or run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    files = {**FILES, "trainer_state.json": json.dumps({"global_step": step})}
    if world_size > 1:
        files |= {f"rng_state_{rank}.pth": "random" for rank in range(world_size)}
        del files["rng_state.pth"]
    for name, text in files.items():
        if name not in without:
            (folder / name).write_text(text if name.endswith("json") else f"{text} of {step}")
    if manifest:
        entries = entries_of(folder, files_in(folder))
        Manifest(step, world_size, step if sequence is None else sequence, entries, **fields).write(folder)
    return folder
