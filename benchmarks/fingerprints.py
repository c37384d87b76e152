"""Fingerprints of short trainings: whether a change of the code changes anything that a run computes.

    python benchmarks/fingerprints.py --json before.json
    python benchmarks/fingerprints.py --against before.json

Each run trains a tiny model, made from a seed, for six steps with other features. Its line holds the hash of the final
weights and that of the log without times and speeds. Against an earlier file, the metrics that both have are compared:
a new metric is no difference, one that is gone is. They are the same on one machine with the same versions of torch and
transformers; another CPU may round differently. `--save` keeps checkpoints of half-way runs, and `--resume` goes on
from them, maybe with other code: their ends must be those of the uninterrupted runs. `PYTHONPATH` says whose code runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
from fingerprint_runs import make_model, make_prompts, make_tokenizer, runs, short_words
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback

import online_dpo
from online_dpo import OnlineDPOConfig, OnlineDPOTrainer

STEPS, HALF_WAY = 6, 3
TIMES = re.compile("time/|perf/|seconds|runtime|per_second")
RESUMED = ("judge", "stale", "stale_judge", "xpo", "lora", "adaptive_beta", "synced_reference")
"""Runs that `--save` and `--resume` make: each has a state of its own in a checkpoint."""


class StopHalfWay(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == HALF_WAY


def make_trainer(name: str, seed: int, output_dir: Path, **more: Any) -> OnlineDPOTrainer:
    own = runs(seed)[name] | more
    fields = dict(
        output_dir=str(output_dir), use_cpu=True, seed=seed, report_to=[], disable_tqdm=True, log_level="error",
        max_steps=STEPS, per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=5e-3,
        logging_steps=1, eval_strategy="steps", eval_steps=4, save_strategy="no", gradient_checkpointing=False,
        num_completions=4, max_new_tokens=12, max_length=40,
    )  # fmt: skip
    fields |= {field: own.pop(field) for field in list(own) if field in OnlineDPOConfig.__dataclass_fields__}
    arguments = dict(reward_funcs=short_words, train_dataset=make_prompts(20, seed)) | own
    trainer = OnlineDPOTrainer(
        model=make_model(LlamaForCausalLM, seed),
        args=OnlineDPOConfig(**fields),
        eval_dataset=make_prompts(6, seed + 1),
        processing_class=make_tokenizer(),
        **arguments,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def checkpoint_in(folder: Path) -> Path:
    return folder / f"checkpoint-{HALF_WAY}"


def save_half_way(name: str, seed: int, folder: Path) -> None:
    """Leaves a checkpoint in the folder."""
    make_trainer(name, seed, folder, save_strategy="steps", save_steps=HALF_WAY, callbacks=[StopHalfWay()]).train()


def fingerprint(name: str, seed: int = 0, checkpoint: Path | None = None) -> dict[str, Any]:
    """Hashes of a run's final weights and of its log, and the log itself. With a checkpoint, the run begins there.

    The last entry of the log is left out: after a resumption, transformers takes its mean loss over fewer steps.
    """
    if checkpoint is not None:  # the trainer does not read it, users do
        assert isinstance(torch.load(checkpoint / "training_args.bin", weights_only=False), OnlineDPOConfig)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(name, seed, Path(folder))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = hashlib.sha256()
    for key, tensor in sorted(trainer.model.state_dict().items()):  # pyright: ignore[reportOptionalMemberAccess]
        weights.update(key.encode() + tensor.contiguous().numpy().tobytes())
    history = [log for log in trainer.state.log_history if "train_runtime" not in log]
    history = [{key: value for key, value in log.items() if not TIMES.search(key)} for log in history]
    log = hashlib.sha256(json.dumps(history, sort_keys=True).encode())
    return {"weights": weights.hexdigest(), "log": log.hexdigest(), "history": history}


def differ(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether weights differ, or any metric of the earlier log."""
    logs = zip(before["history"], now["history"], strict=False)
    same = len(before["history"]) == len(now["history"]) and all(kept(old) == kept(old, new) for old, new in logs)
    return before["weights"] != now["weights"] or not same


def kept(log: dict[str, Any], of: dict[str, Any] | None = None) -> dict[str, Any]:
    """What of a log is compared, or of another one under the same names."""
    return {key: (log if of is None else of).get(key) for key in log if not TIMES.search(key)}


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    for old, new in zip(before["history"], now["history"], strict=False):
        for key in kept(old):
            if old[key] != new.get(key):
                return f"step {new['step']}: {key} was {old.get(key)!r}, is {new.get(key)!r}"
    return "the weights alone, or how many logs there are"


def main() -> None:
    names = list(runs(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, metavar="RUN", help=", ".join(names))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the fingerprints and the logs there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="fail where a run differs from this JSON file")
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--save", type=Path, metavar="FOLDER", help=f"keep half-way checkpoints of {', '.join(RESUMED)}")
    half.add_argument("--resume", type=Path, metavar="FOLDER", help="go on from those checkpoints")
    options = parser.parse_args()
    print("Code:", Path(online_dpo.__file__).parent, file=sys.stderr)
    torch.set_num_threads(1)

    half_way = options.save or options.resume
    chosen = [name for name in options.only or names if half_way is None or name in RESUMED]
    if options.save and (options.json or options.against):
        parser.error("--save leaves checkpoints alone: --json and --against go with whole runs and with --resume")
    if options.resume and (missing := [name for name in chosen if not checkpoint_in(options.resume / name).is_dir()]):
        parser.error(f"there is no {checkpoint_in(options.resume / missing[0])}; make it with --save")
    before = json.loads(options.against.read_text()) if options.against else {}
    found, differing = {}, 0
    for name in chosen:
        if options.save:
            save_half_way(name, options.seed, options.save / name)
            continue
        found[name] = now = fingerprint(name, options.seed, options.resume and checkpoint_in(options.resume / name))
        print(f"{name:<16} weights {now['weights']} log {now['log']}", flush=True)
        if name in before and differ(before[name], now):
            differing += 1
            print(f"  differs from {options.against}: {first_difference(before[name], now)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(f"{differing} runs differ" if differing else 0)


if __name__ == "__main__":
    main()
