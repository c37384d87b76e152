"""A run of many steps: does its memory stay flat, and are its rewards finite?

    python -m gpu_parts.steady --model qwen2.5-0.5b --device cuda --json FILE

All graphs and sizes should be there after a fifth of the steps; what grows from there on is a leak. ``--processes 2``
trains on two cards, each way to share the work in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import MIB, MemoryMeter
from workloads import MODELS, PROMPTS_PER_STEP, make_policy, make_reward_model, make_tokenizer, make_workload

from gpu_parts.record import table, write_tables

WARM = 0.2
"""The share of the steps after which memory may not grow any more."""
SLACK_MIB, SLACK = 128, 0.03
"""What it may grow: lengths differ from step to step, and the allocator keeps the sizes that there have been."""
WAYS: dict[str, dict[str, Any]] = {"DDP": {}, "FSDP2": {"fsdp": "full_shard"}}
FINITE = ("loss", "grad_norm", "rewards/", "objective/", "logps/")


def train(model: str, device: str, steps: int, fields: dict[str, Any]) -> dict[str, Any]:
    """What a run has logged, and its memory after each step in MiB."""
    import torch
    from trainers import force_our_lengths
    from transformers import TrainerCallback

    from online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    processes, meter, on_card = int(os.environ.get("WORLD_SIZE", "1")), MemoryMeter(device), device == "cuda"
    if on_card:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    shape, memory = MODELS[model], []
    workload = make_workload("chat", shape.vocabulary, steps * processes)

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if on_card:
                torch.cuda.synchronize()
                memory.append((torch.cuda.memory_allocated() / MIB, torch.cuda.memory_reserved() / MIB))
            else:
                memory.append((meter.held(), meter.held()))

    with tempfile.TemporaryDirectory() as folder:
        args = OnlineDPOConfig(
            output_dir=folder,
            use_cpu=not on_card,
            bf16=on_card,
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS_PER_STEP,
            max_steps=steps,
            optim="adamw_torch_fused",
            learning_rate=1e-6,
            tie_policy="first",  # reward models in bf16 do tie
            max_new_tokens=workload.max_new_tokens,
            max_length=workload.max_length,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            **fields,
        )
        trainer = OnlineDPOTrainer(
            model=make_policy(shape, device),
            reward_funcs=make_reward_model(shape, device, "bfloat16" if on_card else "float32"),
            train_dataset=workload.dataset(),
            processing_class=make_tokenizer(shape),
            reward_processing_classes=make_tokenizer(shape),
            args=args,
        )
        force_our_lengths(workload)
        trainer.add_callback(Watch())
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"memory": memory, "logs": logs}


def problems(found: dict[str, Any], steps: int, warm: int) -> list[str]:
    """What is wrong with a run."""
    wrong = []
    if len(found["memory"]) != steps or len(found["logs"]) != steps:
        wrong.append(f"{len(found['memory'])} steps and {len(found['logs'])} logs, and there should be {steps}")
    for number, log in enumerate(found["logs"]):
        wrong += [
            f"step {number + 1}: {name} is {value}"
            for name, value in log.items()
            if name.startswith(FINITE) and isinstance(value, int | float) and not math.isfinite(value)
        ]
    for kind, what in enumerate(("allocated", "reserved")):
        before, after = found["memory"][warm - 1][kind], found["memory"][-1][kind]
        if after > before * (1 + SLACK) + SLACK_MIB:
            wrong.append(f"{what} memory has grown from {before:.0f} to {after:.0f} MiB")
    return wrong


def run(options: argparse.Namespace, fields: dict[str, Any]) -> dict[str, Any]:
    """What a run in processes of its own has found, in its first process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = ["-m", "gpu_parts.steady", "--model", options.model, "--device", options.device]
        words += ["--steps", str(options.steps), "--fields", json.dumps(fields), "--json", str(out)]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} if options.device == "cpu" else {}
        subprocess.run([sys.executable, *launch, *words], check=True, env=os.environ | own)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-0.5b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--fields", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.fields is not None:  # one of several processes
        found = train(options.model, options.device, options.steps, options.fields)
        if os.environ["RANK"] == "0":
            options.json.write_text(json.dumps(found))
        return
    warm = max(1, round(WARM * options.steps))
    marks = sorted({1, warm, *range(warm, options.steps, max(1, options.steps // 5)), options.steps})
    tables, wrong = [], []
    for way in options.ways if options.processes > 1 else ["one process"]:
        alone = options.processes == 1
        found = train(options.model, options.device, options.steps, {}) if alone else run(options, WAYS[way])
        wrong += [f"{way}: {line}" for line in problems(found, options.steps, warm)]
        rows = []
        for step in marks:
            log = found["logs"][step - 1]
            rows.append([step, *found["memory"][step - 1], *(log.get(name) for name in ("loss", "objective/scores"))])
        columns = ["after step", "allocated, MiB", "reserved, MiB", "loss", "scores"]
        tables.append(table(f"{options.steps} steps, {options.model}, {way}", columns, rows, *wrong))
        write_tables(options.json, tables, logs=found["logs"])
        for row in rows:
            print(*row)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
