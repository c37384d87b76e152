"""Two real processes whose devices have different room settle on one size; torchrun gives each its rank."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from support import tiny
from support.training import LENGTHS, dataset, trainer

MIB = 2**20
ROOM = (40, 56)
"""MiB that the device of each rank has free."""


def build(out, **fields):
    made = trainer(
        out,
        model=tiny.causal_lm(intermediate_size=1024, sharpness=1.0),
        train_dataset=dataset(lengths=LENGTHS * 2),
        **{"optim": "sgd", "max_steps": 2, "save_strategy": "steps", "save_steps": 1, **fields},
    )
    return made


def train(made, room, **options):
    seen = []
    made.pass_size._device = torch.device("cuda")
    made.pass_size._free = lambda device: room * MIB
    forward = made.objective.losses

    def losses(model, rows, weight=None):
        if model.training:
            seen.append(len(rows.pairs))
        return forward(model, rows, weight)

    made.objective.losses = losses
    made.train(**options)
    return {"tokens": made.pass_size.tokens, "passes": len(seen), "loss": made.state.log_history[0]["loss"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    found = {
        "settled": train(build(out / "run", overwrite_output_dir=False), ROOM[rank]),
        "same room": train(build(out / "same"), max(ROOM)),
        "resumed": train(
            build(out / "run", max_steps=3, overwrite_output_dir=False),
            10 * max(ROOM),
            resume_from_checkpoint=str(out / "run" / "checkpoint-1"),
        ),
    }
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
