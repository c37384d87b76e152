import json

import pytest

from online_dpo.checkpoints.manifest import Manifest, entries_of, files_in

STATE = {"global_step": 0}
FILES = {
    "model.safetensors": "weights",
    "optimizer.pt": "moments",
    "scheduler.pt": "rate",
    "rng_state.pth": "random",
    "guard.json": "{}",
}


@pytest.fixture
def make_checkpoint(tmp_path):
    """Makes ``checkpoint-STEP`` in a folder, whole and with a manifest unless told otherwise."""

    def make(step, run_dir=tmp_path, sequence=None, world_size=1, manifest=True, without=(), folder=None, **fields):
        folder = folder or run_dir / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        files = {**FILES, "trainer_state.json": json.dumps({"global_step": step})}
        if world_size > 1:
            files |= {f"rng_state_{rank}.pth": "random" for rank in range(world_size)}
            del files["rng_state.pth"]
        for name, text in files.items():
            if name not in without:
                (folder / name).write_text(f"{text}" if name.endswith("json") else f"{text} of {step}")
        if manifest:
            entries = entries_of(folder, files_in(folder))
            Manifest(step, world_size, step if sequence is None else sequence, entries, **fields).write(folder)
        return folder

    return make
