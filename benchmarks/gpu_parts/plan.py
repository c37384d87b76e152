"""Everything that awaits a GPU, in the order of its worth: what each part shows, its command, and its time limit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_parts.record import table

HALF, LARGE = "qwen2.5-0.5b", "qwen2.5-1.5b"


@dataclass(frozen=True)
class Setup:
    """How all parts run: on a card, or in a rehearsal on a CPU with tiny models and few steps."""

    dry_run: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def model(self, name: str) -> list[str]:
        """The options for a model and the device."""
        return ["--model", "tiny" if self.dry_run else name, "--device", self.device]

    def either(self, on_card: str, rehearsal: str) -> list[str]:
        """The words of one of two command lines."""
        return (rehearsal if self.dry_run else on_card).split()


Reader = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]
"""From what a part's command has written as JSON to tables."""


@dataclass(frozen=True)
class Part:
    """A part of the benchmark: a process of its own.

    ``command`` gives its words after ``python``, from the setup and the file to write. ``limit`` is in seconds.
    ``cards`` and ``package`` are what it needs to be there.
    """

    name: str
    shows: str
    limit: float
    command: Callable[[Setup, Path], list[str]]
    read: Reader
    cards: int = 1
    package: str | None = None


def own_tables(written: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tables of parts that write them."""
    yield from written["tables"]


def no_tables(written: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of parts whose last lines say all."""
    yield from ()


def step_tables(written: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of `benchmarks/step.py`."""
    phases = ("generate", "score", "reference", "policy_forward", "backward", "optimizer", "step")
    columns = ["variant", *(f"{phase.replace('_', ' ')}, s" for phase in phases)]
    columns += ["share of the matrix rate", "allocated, MiB", "reserved, MiB"]
    for workload, variants in written["workloads"].items():
        rows, notes = [], [f"Matrix rate {written['matrix_rate_gflops'] / 1000:.0f} TFLOP/s, measured."]
        for name, row in variants.items():
            if "failed" in row:
                rows.append([name, *[None] * (len(columns) - 1)])
                notes.append(f"{name} has failed: {last_line(row['failed'])}")
                continue
            seconds = [row["seconds"].get(phase, {}).get("median") for phase in phases]
            rows.append([name, *seconds, row["limit_share"], row["allocated_mib"], row["reserved_mib"]])
        yield table(f"A step, {workload}, {written['model']}, {written['prompts']} prompts", columns, rows, *notes)


def trl_tables(written: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of `benchmarks/vs_trl.py`."""
    columns = ["workload", "part", "TRL", "ours", "TRL / ours"]
    rows: list[list[Any]] = []
    notes = [f"Matrix rate {written['matrix_rate_gflops'] / 1000:.0f} TFLOP/s, measured."]
    for workload, figures in written["workloads"].items():
        for part in ("step", "non_generation", "generate", "score", "reference", "policy_forward", "backward"):
            sides = [figures.get(side, {}).get(part, {}).get("median") for side in ("trl", "ours")]
            rows.append([workload, f"{part.replace('_', ' ')}, s", *sides, figures.get("speedup", {}).get(part)])
        for name, key in (("allocated, MiB", "allocated_mib"), ("reserved, MiB", "reserved_mib")):
            trl, ours = (figures[key].get(side) for side in ("trl", "ours"))
            rows.append([workload, name, trl, ours, trl / ours if trl and ours else None])
        shares = [figures["limit_share"].get(side) for side in ("trl", "ours")]
        rows.append([workload, "share of the matrix rate", *shares, None])
        notes += [
            f"{workload}: {side} has failed: {last_line(text)}" for side, text in figures.get("failed", {}).items()
        ]
    yield table(f"Against TRL, {written['model']}, {written['prompts']} prompts a step", columns, rows, *notes)


def last_line(text: str) -> str:
    """What an error says in the end."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")[:400]


def tests(name: str) -> Callable[[Setup, Path], list[str]]:
    """The tests of a file in tests/gpu. Stacks are shown where one of them hangs."""

    def command(setup: Setup, out: Path) -> list[str]:
        options = "-v --tb=short -p no:cacheprovider -o faulthandler_timeout=100 --durations=5"
        return ["-m", "pytest", f"tests/gpu/{name}.py", *options.split(), *setup.either("", "--rehearse")]

    return command


def script(words: str, model: str, on_card: str = "", rehearsal: str = "") -> Callable[[Setup, Path], list[str]]:
    """A script, with options that differ between a card and a rehearsal."""

    def command(setup: Setup, out: Path) -> list[str]:
        return [*words.split(), *setup.model(model), *setup.either(on_card, rehearsal), "--json", str(out)]

    return command


def card(setup: Setup, out: Path) -> list[str]:
    seconds = setup.either("0.5", "0.02")
    return ["-m", "gpu_parts.card", "--device", setup.device, "--seconds", *seconds, "--json", str(out)]


def head(setup: Setup, out: Path) -> list[str]:
    tiny = "--tokens 64 --hidden 32 --vocabulary 500 --repetitions 1"
    sizes = setup.either("--tokens 8192 --hidden 896 --vocabulary 151936", tiny)
    return ["benchmarks/head.py", "--device", setup.device, *sizes]


STEP = "benchmarks/step.py --dtype bfloat16"
TRL = "benchmarks/vs_trl.py --dtype bfloat16"
TINY = "--workload chat --repetitions 1 --threads 1"
PARTS = (
    Part("card", "The card's own copies and products, which all shares are of.", 60, card, own_tables),
    Part(
        "tests-graphs",
        "CUDA graphs of decoding steps: captured, replayed after weights have changed, with LoRA, in bf16 under "
        "autocast, and while a second thread scores; draws under deterministic algorithms.",
        150,
        tests("test_cuda_graphs"),
        no_tables,
    ),
    Part(
        "tests-attention",
        "FlexAttention and SDPA's kernel, forward and backward by value, in fp32 and bf16, with windows; many lengths; "
        "memory.",
        240,
        tests("test_attention"),
        no_tables,
    ),
    Part(
        "tests-training",
        "bf16 under autocast: log-probabilities, gradients, the head, references; whole runs with LoRA, gradient "
        "checkpointing and evaluation.",
        150,
        tests("test_training"),
        no_tables,
    ),
    Part(
        "decoding-0.5b",
        "Decoding rates by batch, K and length, as shares of the memory bandwidth; static steps against others.",
        180,
        script("-m gpu_parts.decoding", HALF, "", "--few --repetitions 1"),
        own_tables,
    ),
    Part(
        "step-0.5b",
        "Seconds and memory of a step by variant, with its share of the matrix rate.",
        150,
        script(
            STEP,
            HALF,
            "--workload long-answer --prompts 32 --repetitions 1 --limit 60 "
            "--variant plain lora gradient-checkpointing sdpa",
            f"{TINY} --variant lora-gradient-checkpointing",
        ),
        step_tables,
        package="peft",
    ),
    Part(
        "trl-0.5b",
        "The table against TRL, with its dynamic and its static cache, one trainer after the other.",
        360,
        script(
            TRL,
            HALF,
            "--workload chat long-answer long-prompt --repetitions 2 --limit 100 --trl-cache dynamic static",
            f"{TINY} --order one-after-the-other --trl-cache dynamic static",
        ),
        trl_tables,
        package="trl",
    ),
    Part(
        "kernels",
        "Which attention kernels and matrix products the profiler sees, and their shares of the time.",
        90,
        script("-m gpu_parts.kernels", HALF, "--workload long-answer", "--warm-up 1"),
        own_tables,
    ),
    Part(
        "steady",
        "50 steps: memory after step 10 against step 50, and finite rewards.",
        120,
        script("-m gpu_parts.steady", HALF, "--steps 50", "--steps 4"),
        own_tables,
    ),
    Part("head", "The head: ours against PyTorch's own and Liger's.", 120, head, no_tables),
    Part(
        "decoding-1.5b",
        "The same rates for the larger shape.",
        180,
        script("-m gpu_parts.decoding", LARGE, "", "--few --repetitions 1"),
        own_tables,
    ),
    Part(
        "trl-1.5b",
        "The table against TRL at 1.5B, which does not fit beside another trainer.",
        360,
        script(
            TRL,
            LARGE,
            "--workload chat long-answer --repetitions 2 --limit 120 --trl-cache dynamic static",
            f"{TINY} --order one-after-the-other",
        ),
        trl_tables,
        package="trl",
    ),
    Part(
        "step-1.5b",
        "A step of the larger shape by variant.",
        180,
        script(
            STEP,
            LARGE,
            "--workload long-answer --prompts 16 --repetitions 1 --limit 60 "
            "--variant plain lora gradient-checkpointing sdpa",
            f"{TINY} --variant plain",
        ),
        step_tables,
        package="peft",
    ),
    Part(
        "memory",
        "The peaks of steps against the formula that `online-dpo doctor` and docs/guides/several-gpus.md use.",
        240,
        script("-m gpu_parts.memory", HALF, "--limit 60", "--workload chat --variant plain"),
        own_tables,
        package="peft",
    ),
    Part(
        "vllm",
        "vLLM in the same process: its rate beside the built-in engine's.",
        300,
        script(
            "benchmarks/rollout.py --engine vllm built-in-static --dtype bfloat16",
            HALF,
            "--prompts 64 --completions 8 --prompt 128 --new 128",
            "--prompts 2 --completions 2 --prompt 16 --new 8 --repetitions 1",
        ),
        lambda written: iter([rollout_table(written)]),
        package="vllm",
    ),
    Part(
        "two-cards",
        "Steps of two ranks over NCCL, under DDP and FSDP2.",
        180,
        script("-m gpu_parts.steady --processes 2", HALF, "--steps 10", "--steps 2 --ways DDP"),
        own_tables,
        cards=2,
    ),
)
"""What comes first is worth most; what the first 25 minutes hold is decided by the limits (`gpu.py --list`)."""


def rollout_table(written: dict[str, Any]) -> dict[str, Any]:
    """Of `benchmarks/rollout.py`."""
    keys = ["engine", "prompts", "completions", "prompt_tokens", "new_tokens", "seconds", "tokens_per_second"]
    rows = [[row[key] for key in (*keys, "limit_share")] for row in written["rows"]]
    return table(
        f"Sampling, {written['model']}", [*(key.replace("_", " ") for key in keys), "share of the limit"], rows
    )


def tables_of(part: Part, out: Path) -> list[dict[str, Any]]:
    """What a part has written, if anything, as tables."""
    return list(part.read(json.loads(out.read_text()))) if out.exists() else []
