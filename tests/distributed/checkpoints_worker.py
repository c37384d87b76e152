"""Run by torchrun with two processes and by plain Python with one: saves and resumes in several ways of sharding."""

import itertools
import os
import sys
import traceback
from pathlib import Path

import torch
from peft import LoraConfig
from sharding_worker import ways, whole_weights

from online_dpo.distributed.sharding import full_of_part, part
from support.training import LORA, dataset, trainer, without_times

SHARDED = ("fsdp2", "zero1", "zero2", "zero3")
LENGTHS = (5, 9, 3, 7, 12, 4, 6, 8)
BASE = dict(optim="adamw_torch", learning_rate=1e-3, max_tokens_per_pass=80, max_steps=4, save_steps=2)
BASE |= dict(save_strategy="steps", logging_steps=3, lr_scheduler_type="linear", max_grad_norm=1.0, adam_epsilon=1e-4)
CASES = {
    "full": dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5, target_kl=0.1),
    "lora": dict(kwargs={"peft_config": LoraConfig(**LORA)}),
}
OTHER = {"fsdp2": "zero3", "zero1": "fsdp2", "zero2": "zero1", "zero3": "zero2"}
"""Whose checkpoint a way resumes, beside its own."""


def folder(out, way, case, processes):
    return out / "runs" / f"{way}-{case}-of-{processes}"


def run(out, way, case, processes, resumed=None, batch=8, **options):
    """Trains; ``resumed`` is the way and the number of processes whose checkpoint of step 2 is gone on from."""
    kind = f"{way}-{case}-of-{processes}" + (f"-from-{resumed[0]}-of-{resumed[1]}" if resumed else "")
    options = {**BASE, **CASES[case], **options}
    kwargs = dict(options.pop("kwargs", {}))
    made = trainer(
        out / "runs" / kind,
        per_device_train_batch_size=batch // processes,
        train_dataset=dataset(lengths=LENGTHS * 2),
        **options,
        **ways(way),
        kwargs=kwargs,
    )
    assert made.accelerator.num_processes == processes and made.sharding.name == (way if processes > 1 else "none")
    made.train(None if resumed is None else str(folder(out, resumed[0], case, resumed[1]) / "checkpoint-2"))
    made.save_model()
    reference = made.reference.model
    saved = {
        "weights": whole_weights(made),
        "log": [without_times(log) for log in made.state.log_history if "train_runtime" not in log],
        "reference": {}
        if reference is None
        else {n: full_of_part(p, part(p)) for n, p in reference.named_parameters()},
    }
    torch.save(saved, out / f"{kind}-rank-{made.accelerator.process_index}.pt")


def main():
    torch.set_num_threads(1)
    out, what = Path(sys.argv[1]), sys.argv[2]
    chosen = sys.argv[3].split(",") if len(sys.argv) > 3 else SHARDED
    for way, case in itertools.product(chosen, CASES):
        try:
            if what == "one":
                run(out, "none", case, 1)
            elif what == "two":
                run(out, way, case, 2)
                run(out, way, case, 2, resumed=(way, 2))
                run(out, way, case, 2, resumed=("none", 1))
            else:
                run(out, "none", case, 1, resumed=(way, 2))
        except BaseException:
            print(f"CASE {what} {way} {case} rank {os.environ.get('RANK')}", file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


if __name__ == "__main__":
    main()
