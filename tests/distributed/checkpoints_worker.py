"""Run by torchrun with two processes and by plain Python with one: saves and resumes in several ways of sharding."""

import itertools
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from peft import LoraConfig
from sharding_worker import ways, whole_weights
from transformers import TrainerCallback

from online_dpo.distributed.weights import full
from online_dpo.errors import CheckpointError
from support.killed_runs import kill_at
from support.training import LORA, dataset, trainer, without_times

SHARDED = ("fsdp2", "zero1", "zero2", "zero3")
LENGTHS = (5, 9, 3, 7, 12, 4, 6, 8)
BASE = dict(optim="adamw_torch", learning_rate=1e-3, max_tokens_per_pass=80, max_steps=4, save_steps=2)
BASE |= dict(save_strategy="steps", logging_steps=3, lr_scheduler_type="linear", max_grad_norm=1.0, adam_epsilon=1e-4)
CASES = {
    "full": dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5, target_kl=0.1),
    "lora": dict(kwargs={"peft_config": LoraConfig(**LORA)}),
}


def folder(out, way, case, processes):
    return out / "runs" / f"{way}-{case}-of-{processes}"


def made_trainer(out, name, way, processes, batch=8, **options):
    options = {**BASE, **options}
    kwargs = dict(options.pop("kwargs", {}))
    made = trainer(
        out / "runs" / name,
        per_device_train_batch_size=batch // processes,
        train_dataset=dataset(lengths=LENGTHS * 2),
        **{**options, **ways(way)},
        kwargs=kwargs,
    )
    assert made.accelerator.num_processes == processes
    return made


def run(out, way, case, processes, resumed=None, batch=8, **options):
    """Trains; ``resumed`` is the way and the number of processes whose checkpoint of step 2 is gone on from."""
    kind = f"{way}-{case}-of-{processes}" + (f"-from-{resumed[0]}-of-{resumed[1]}" if resumed else "")
    made = made_trainer(out, kind, way, processes, batch, **{**CASES[case], **options})
    made.train(None if resumed is None else str(folder(out, resumed[0], case, resumed[1]) / "checkpoint-2"))
    made.save_model()
    reference = made.reference.model
    saved = {
        "weights": whole_weights(made),
        "log": [without_times(log) for log in made.state.log_history if "train_runtime" not in log],
        "reference": {} if reference is None else {n: full(p).clone() for n, p in reference.named_parameters()},
    }
    torch.save(saved, out / f"{kind}-rank-{made.accelerator.process_index}.pt")


def best(out, way):
    """The best of two checkpoints is loaded at the end; a run that saves models alone; one of another batch size."""
    kwargs = {"eval_dataset": dataset(lengths=(3, 4, 5, 6))}
    options = dict(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2, max_steps=4)
    made = made_trainer(
        out,
        f"{way}-best",
        way,
        2,
        **options,
        load_best_model_at_end=True,
        metric_for_best_model="eval_step",
        greater_is_better=False,
        save_total_limit=1,
        kwargs=kwargs,
    )
    made.add_callback(Steps())
    made.train()
    first = Path(made.state.best_model_checkpoint)
    saved = {"best": first.name, "checkpoints": sorted(path.name for path in first.parent.glob("checkpoint-*"))}
    saved["weights"] = whole_weights(made)
    made = made_trainer(out, f"{way}-only", way, 2, max_steps=2, save_only_model=True)
    made.train()
    saved["only"] = sorted(path.name for path in (out / "runs" / f"{way}-only" / "checkpoint-2").iterdir())
    try:
        made_trainer(out, f"{way}-larger", way, 2, batch=4).train(str(folder(out, way, "full", 2) / "checkpoint-2"))
    except CheckpointError as error:
        saved["refused"] = str(error)
    torch.save(saved, out / f"{way}-best-rank-{made.accelerator.process_index}.pt")


class Steps(TrainerCallback):
    """Makes the first evaluation the best one."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_step"] = state.global_step


def in_bf16(out):
    """DeepSpeed casts a model of fp32 to bf16 and trains in fp32: a checkpoint holds that."""
    config = ways("zero3")["deepspeed"] | {"bf16": {"enabled": True}}
    made = made_trainer(out, "bf16", "none", 2, deepspeed=config, bf16=True, max_steps=2)
    made.train()
    made.save_model()
    trained = dict(made.model.named_parameters())
    saved = {"rounded": whole_weights(made), "exact": {n: made.sharding.full_trained(p) for n, p in trained.items()}}
    torch.save(saved, out / f"bf16-rank-{made.accelerator.process_index}.pt")


class Killed(TrainerCallback):
    """Kills a rank while the checkpoint of step 4 is saved, or before step 4 is begun."""

    def __init__(self, folder, rank, change):
        self.folder, self.rank, self.change = folder, rank, change

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == self.rank:
            kill_at(self.folder, self.change) if self.change is not None else os.kill(os.getpid(), signal.SIGKILL)


def killed(out, way, rank, change):
    made = made_trainer(out, f"{way}-killed", way, 2)
    made.add_callback(Killed(out / "runs" / f"{way}-killed", rank, change))
    made.train()


def main():
    torch.set_num_threads(1)
    out, what = Path(sys.argv[1]), sys.argv[2]
    if what == "killed":
        killed(out, sys.argv[3], int(sys.argv[4]), int(sys.argv[5]) if len(sys.argv) > 5 else None)
        return
    try:
        if what == "one":
            for case in CASES:
                run(out, "none", case, 1)
        elif what == "two":
            for way, case in itertools.product(SHARDED, CASES):
                run(out, way, case, 2)
                run(out, way, case, 2, resumed=(way, 2))
                if (way, case) in (("fsdp2", "full"), ("zero3", "full"), ("zero1", "lora")):
                    run(out, way, case, 2, resumed=("none", 1))
            run(out, "zero3", "full", 2, resumed=("fsdp2", 2))
            run(out, "fsdp2", "full", 2, resumed=("zero2", 2))
            best(out, "fsdp2")
            best(out, "zero3")
            in_bf16(out)
        else:
            for way, case in itertools.product(SHARDED, CASES):
                run(out, "none", case, 1, resumed=(way, 2))
    except BaseException:
        print(f"CASE {what} rank {os.environ.get('RANK')}", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
