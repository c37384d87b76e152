"""Which kernels a card runs: in sampling, and in the rest of a step. Their names tell which ways PyTorch has taken.

python -m gpu_parts.kernels --model qwen2.5-0.5b --device cuda --json FILE
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

from measure import PHASES
from workloads import MODELS

from gpu_parts.record import table, write_tables

KINDS = {
    "attention": r"flash|fmha|attention|sdpa|flex",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|addmm|\bmm\b|matmul|linear|gemv",
    "optimizer": r"adam|multi_tensor",
    "softmax and reductions": r"softmax|reduce|logsumexp|cumsum|scan|sort|topk",
    "copies and casts": r"copy|memcpy|memset|\bto\b|clone|contiguous|cat",
    "compiled": r"triton",
}
"""Words in the names of kernels, the first that fits."""
TOP = 15
LONGEST_NAME = 110


def kind_of(name: str) -> str:
    """What a kernel does, by its name.

    >>> kind_of("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>"), kind_of("vectorized_elementwise_kernel")
    ('matrix products', 'elementwise and others')
    """
    found = (kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE))
    return next(found, "elementwise and others")


def profiled(profile: Any, device: str) -> list[tuple[str, int, float]]:
    """Name, number of calls and seconds of everything that has run, the most time first."""
    from torch.autograd import DeviceType

    rows = []
    for event in profile.key_averages():
        seconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if (event.device_type == DeviceType.CUDA) == (device == "cuda") and seconds > 0:
            rows.append((event.key, event.count, seconds / 1e6))
    return sorted(rows, key=lambda row: -row[2])


def tables_of(title: str, rows: list[tuple[str, int, float]]) -> list[dict[str, Any]]:
    """The kernels that take most time, and all by kind."""
    whole = sum(seconds for *_, seconds in rows)
    assert whole > 0, "the profiler has seen no kernel"
    top = [[name[:LONGEST_NAME], count, seconds * 1000, seconds / whole] for name, count, seconds in rows[:TOP]]
    kinds: dict[str, list[Any]] = {}
    for name, count, seconds in rows:
        kind = kinds.setdefault(kind_of(name), [0, 0.0])
        kind[0] += count
        kind[1] += seconds
    by_kind = [[kind, n, seconds * 1000, seconds / whole] for kind, (n, seconds) in kinds.items()]
    columns = ["kernel", "calls", "ms", "share"]
    return [
        table(f"{title}: by kind", ["kind", *columns[1:]], sorted(by_kind, key=lambda row: -row[2])),
        table(f"{title}: the {TOP} that take most time", columns, top),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-0.5b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--workload", default="chat")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the one that is profiled")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    import torch
    from torch.profiler import ProfilerActivity, profile
    from trainers import Job, Probe, build
    from transformers import TrainerCallback

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device == "cuda" else [])
    sampling, rest = (profile(activities=activities) for _ in range(2))
    job = Job(
        "ours",
        options.workload,
        options.model,
        options.device,
        "bfloat16",
        torch.get_num_threads(),
        options.warm_up + 1,
    )
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(options.device)
        trainer = build(job, folder, probe)
        generate = trainer.sampler.engine.generate

        def generate_profiled(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step < options.warm_up:
                return generate(*args, **kwargs)
            with sampling:
                groups = generate(*args, **kwargs)
            rest.start()
            return groups

        class Steps(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                probe.time_optimizer(trainer)
                probe.start(memory=False)

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                seconds.append(probe.timer.stop())  # which waits for the card
                if trainer.state.global_step == options.warm_up + 1:
                    rest.stop()
                probe.start(memory=False)

        seconds: list[dict[str, float]] = []
        trainer.sampler.engine.generate = generate_profiled
        trainer.add_callback(Steps())
        trainer.train()
    phases = [[phase, seconds[-2].get(phase, 0.0)] for phase in (*PHASES, "other", "step")]
    tables = [table("Seconds of a step that was not profiled", ["phase", "seconds"], phases)]
    for title, made in (("Sampling", sampling), ("The rest of the step", rest)):
        rows = profiled(made, options.device)
        tables += tables_of(title, rows)
        write_tables(options.json, tables)
        print(title, *rows[:TOP], sep="\n")


if __name__ == "__main__":
    main()
