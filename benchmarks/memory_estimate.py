"""The memory that `online_dpo.sizing` predicts for each workload, against the peak of the processes that train it.

    python benchmarks/memory_estimate.py --json benchmarks/results/memory-cpu.json      30 minutes on two idle cores

Each workload is trained for two steps on CPU processes of its own: one, and two under DDP, FSDP2, ZeRO-2 and ZeRO-3.
Measured is the most resident memory of the process that takes most; beside it stands that of the same run with a tiny
model, which is libraries. Memory does not depend on how busy a machine is.

A run on a CPU has glibc keep what is freed for the next tensors (`modeling.malloc`), up to a GiB, as a GPU's allocator
does. What a run needs is less than what its processes then hold. So there are two measurements: `needed`, with an
allocator that gives large blocks back at once, and `held`, as a run is without further ado.

    python benchmarks/memory_estimate.py --measured benchmarks/results/memory-cpu.json  the formula of now, seconds
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import MIB, describe_machine, versions
from workloads import (
    KINDS,
    MODELS,
    PROMPTS_PER_STEP,
    Shape,
    make_policy,
    make_reward_model,
    make_tokenizer,
    make_workload,
)

WAYS = {"one process": 1, "DDP": 2, "FSDP2": 2, "ZeRO-2": 2, "ZeRO-3": 2}
"""Ways to share the work, and the processes of each."""
FIELDS: dict[str, dict[str, Any]] = {
    "one process": {},
    "DDP": {},
    "FSDP2": {"fsdp": "full_shard"},
    **{
        f"ZeRO-{stage}": {
            "deepspeed": {
                "zero_optimization": {
                    "stage": stage,
                    "reduce_bucket_size": "auto",
                    "stage3_prefetch_bucket_size": "auto",
                    "stage3_param_persistence_threshold": "auto",
                },
                "bf16": {"enabled": "auto"},
                "gradient_clipping": "auto",
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
            }
        }
        for stage in (2, 3)
    },
}
SHARDING = {"one process": "none", "DDP": "none", "FSDP2": "fsdp2", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
STEPS = 2
"""Adam's state is there from the first step on, and gradients beside it from the second."""
LORA_RANK = 16


# --- a process that trains -------------------------------------------------------------------------------------------


def highest() -> float:
    """The most resident memory that this process has had, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def train(job: dict[str, Any], out: str) -> None:
    """Trains one job, and writes the peaks of this process."""
    import torch
    from trainers import force_our_lengths

    from online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    torch.set_num_threads(1)
    shape, processes = MODELS[job["model"]], WAYS[job["way"]]
    workload = make_workload(job["workload"], shape.vocabulary, STEPS * processes)
    policy, reward_model = make_policy(shape, "cpu"), make_reward_model(shape, "cpu", "float32")
    with tempfile.TemporaryDirectory() as folder:
        args = OnlineDPOConfig(
            output_dir=folder,
            use_cpu=True,
            gradient_checkpointing=job["gradient_checkpointing"],
            per_device_train_batch_size=PROMPTS_PER_STEP,
            max_steps=STEPS,
            optim="adamw_torch_fused",
            learning_rate=1e-6,
            beta=[0.1],
            temperature=1.0,
            num_completions=workload.completions,
            tie_policy="first",
            max_new_tokens=workload.max_new_tokens,
            max_length=workload.max_length,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=10**6,
            **FIELDS[job["way"]],
        )
        trainer: Any = OnlineDPOTrainer(
            model=policy,
            reward_funcs=reward_model,
            train_dataset=workload.dataset(),
            processing_class=make_tokenizer(shape),
            reward_processing_classes=make_tokenizer(shape),
            args=args,
            peft_config=adapter() if job["lora"] else None,
        )
        force_our_lengths(workload)
        trainer.train()
    Path(f"{out}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(highest()))


def adapter() -> Any:
    """An adapter on all linear layers."""
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


# --- the process that asks -------------------------------------------------------------------------------------------


def measure(job: dict[str, Any], gives_back: bool) -> float:
    """Starts the processes of a job, and returns the most memory that one of them took, in MiB."""
    processes = WAYS[job["way"]]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    own |= {"MALLOC_MMAP_THRESHOLD_": str(MIB)} if gives_back else {}
    own |= {"DS_ACCELERATOR": "cpu"} if job["way"].startswith("ZeRO") else {}
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/rank"
        command = [sys.executable, *(launch if processes > 1 else [])]
        command += [__file__, "--job", json.dumps(job), "--out", out]
        done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            raise SystemExit(f"error: {job} ended with status {done.returncode}\n{done.stderr[-3000:]}")
        return max(json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(processes))


def measured_rows(jobs: list[dict[str, Any]], modes: list[str]) -> Iterator[dict[str, Any]]:
    """Yields each job with what was measured of it."""
    libraries: dict[tuple[str, str], float] = {}
    for job in jobs:
        for mode in modes:
            base = (job["way"], mode)
            if base not in libraries:
                libraries[base] = measure({**job, "workload": "chat", "model": "tiny"}, mode == "needed")
            peak = measure(job, mode == "needed")
            yield {**job, "measured": mode, "peak": round(peak), "libraries": round(libraries[base])}


def estimate(job: dict[str, Any]) -> dict[str, float]:
    """What the formula says, by phase and together with libraries, in MiB."""
    from online_dpo.sizing.needs import LIBRARIES, memory_needs
    from online_dpo.sizing.plan import Plan

    needs = memory_needs(Plan(**plan_fields(job)))
    return {
        **{name: round(size / MIB, 1) for name, size in needs.phases().items()},
        "peak": round((needs.process + LIBRARIES) / MIB),
    }


def plan_fields(job: dict[str, Any], most_tokens: int = 1024) -> dict[str, Any]:
    """The job in the words of the formula. Nothing of what was measured goes in. Lengths are those of the prompts, and
    of the completions of the first few, as `online-dpo doctor` sees them before a run.
    """
    from online_dpo.sizing.lengths import fullest_pass
    from online_dpo.sizing.shape import as_reward_model

    kind, shape = KINDS[job["workload"]], model_shape(MODELS[job["model"]])
    workload = make_workload(job["workload"], shape.vocabulary, STEPS * WAYS[job["way"]])
    sizes = fullest_pass(
        [len(ids) for ids in workload.prompts],
        [length for row in workload.lengths[:PROMPTS_PER_STEP] for length in row[: kind.completions]],
        per_batch=PROMPTS_PER_STEP,
        batches=1,
        most_tokens=most_tokens,
        num_completions=kind.completions,
        scored_at_once=16,
    )
    return dict(
        policy=shape,
        sharding=SHARDING[job["way"]],
        gpus=WAYS[job["way"]],
        on_cpu=True,
        bf16=False,
        adapter="lora" if job["lora"] else "none",
        lora_rank=LORA_RANK,
        reward_model=as_reward_model(shape),
        reward_model_bytes=4,
        sequences=PROMPTS_PER_STEP * kind.completions,
        completions=kind.completions,
        prompt_tokens=kind.longest_prompt,
        new_tokens=kind.max_new_tokens,
        tokens_per_pass=sizes.beside,
        tokens_alone=sizes.alone,
        tokens_scored=sizes.scored,
        gradient_checkpointing=job["gradient_checkpointing"],
    )


def model_shape(shape: Shape) -> Any:
    """The same shape for the formula."""
    from online_dpo.sizing.shape import ModelShape

    head = shape.hidden // shape.heads
    return ModelShape(
        shape.hidden, shape.layers, shape.heads, shape.kv_heads, head, shape.intermediate, shape.vocabulary, True, True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=MODELS)
    parser.add_argument("--workload", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--way", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--mode", nargs="+", default=["needed", "held"], choices=["needed", "held"])
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="measure nothing: take the peaks of this file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        train(json.loads(args.job), args.out)
        return
    shared = {"model": args.model, "lora": args.lora, "gradient_checkpointing": args.gradient_checkpointing}
    jobs = [{"workload": workload, "way": way, **shared} for workload in args.workload for way in args.way]
    print("| workload | way | estimated, MiB | measured, MiB | | estimated / measured |")
    print("|---|---|---:|---:|---|---:|")
    before = None if args.measured is None else json.loads(args.measured.read_text())
    rows = []
    for row in measured_rows(jobs, args.mode) if before is None else before["rows"]:
        expected = estimate(row)
        ratio = round(expected["peak"] / row["peak"], 2)
        names = f"| {row['workload']} | {row['way']} "
        print(f"{names}| {expected['peak']:.0f} | {row['peak']:.0f} | {row['measured']} | {ratio:.2f} |", flush=True)
        rows.append({**row, "estimated": expected, "ratio": ratio})
        if args.json is not None:
            facts = {
                "command": " ".join(["python", "benchmarks/memory_estimate.py", *sys.argv[1:]]),
                "machine": describe_machine("cpu", 1),
                "versions": versions(),
            }
            args.json.write_text(json.dumps({**(before or facts), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
