"""Decoding rates of the built-in engine as a trainer has it: weights in fp32, linear layers in bf16 under autocast.

    python -m gpu_parts.decoding --model qwen2.5-0.5b --device cuda --json FILE

A point is a number of prompts, of completions of each (K), and lengths. A call that samples one token is a prefill;
what a call with more tokens takes above it are decoding steps. A step has to read the weights of all layers and of the
head once, the keys and values of each prompt once, and of each completion: these bytes over the seconds of a step are a
share of the bandwidth. With many sequences its products may take longer than that; the share of the limit is of
whichever is more. Each way samples with an engine of its own and the same model.
"""

from __future__ import annotations

import argparse
import random
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

from measure import MIB, matrix_rate
from workloads import FIRST_WORD, MODELS, Shape, make_policy, make_tokenizer

from gpu_parts.card import copy_bandwidth, nominal_bandwidth
from gpu_parts.record import table, write_tables

WAYS: dict[str, dict[str, Any]] = {
    "static": {"static": True},
    "dynamic": {"static": False},
    "static, LoRA": {"static": True, "lora": True},
    "generate, static cache": {"extra": {"cache_implementation": "static"}},
    "generate": {"extra": {"no_repeat_ngram_size": 0}},  # an option that changes nothing, and only `generate` knows
}
POINTS = [
    (64, 8, 128, 128),
    (8, 1, 128, 128),
    (8, 8, 128, 128),
    (32, 8, 128, 128),
    (8, 2, 512, 512),
    (16, 2, 128, 128),
    (256, 2, 128, 128),
    (8, 8, 2048, 128),
]
"""Prompts, K, prompt tokens, new tokens; in the order of their worth."""
SLOW = 3
"""Points of the ways that take long and are not ours."""
COLUMNS = [
    *("way", "prompts", "K", "prompt", "new", "prefill, s", "ms a step", "tokens/s"),
    *("share of copying", "share of nominal", "share of the limit", "graphs", "peak MiB"),
]


def bytes_a_step(shape: Shape, prompts: int, k: int, prompt: int, new: int) -> float:
    """Bytes that a decoding step has to read, in bf16, as the mean over the steps of a call."""
    weights = shape.layers * shape.layer_weights + shape.hidden * shape.vocabulary
    cached = prompts * prompt + prompts * k * new / 2
    return 2.0 * (weights + 2 * shape.layers * shape.kv_width * cached)


def flop_a_step(shape: Shape, prompts: int, k: int, prompt: int, new: int) -> float:
    """Operations of a decoding step's products, as the mean over the steps of a call."""
    weights = shape.layers * shape.layer_weights + shape.hidden * shape.vocabulary
    seen = prompt + new / 2
    return prompts * k * (2.0 * weights + 4 * shape.layers * shape.hidden * seen)


class Measurement:
    """Ways of decoding with one model on one device."""

    def __init__(self, model_name: str, device: str, repetitions: int) -> None:
        self.shape, self.device, self.repetitions = MODELS[model_name], device, repetitions
        self.tokenizer = make_tokenizer(self.shape)
        self.model: Any = make_policy(self.shape, device).eval()
        self.adapted: Any = None

    def of_way(self, way: dict[str, Any]) -> Any:
        """The model of a way. The adapter goes on last: PEFT puts it into the model itself."""
        if not way.get("lora"):
            assert self.adapted is None
            return self.model
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
        self.adapted = self.adapted or get_peft_model(self.model, lora).eval()
        return self.adapted

    def seconds(self, engine: Any, point: tuple[int, int, int, int], new: int, extra: dict[str, Any]) -> float:
        """The median seconds of a call, after one that is not counted."""
        import torch

        from online_dpo.rollout.params import RolloutKey, SamplingParams
        from online_dpo.types import Prompt

        prompts, k, length, _ = point
        took = []
        for step in range(self.repetitions + 1):
            draw = random.Random(step)
            words = [draw.choices(range(FIRST_WORD, self.shape.vocabulary), k=length) for _ in range(prompts)]
            given = [Prompt("", tuple(ids), row) for row, ids in enumerate(words)]
            params = SamplingParams(max_new_tokens=new, end_token_ids=(), extra=extra)
            start = time.perf_counter()
            groups = engine.generate(given, k, params, RolloutKey(0, step))
            if self.device == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
            lengths = {len(completion.token_ids) for group in groups for completion in group.completions}
            assert lengths == {new}, f"completions of {lengths} tokens, asked for {new}"
        return median(took[1:])

    def row(self, name: str, point: tuple[int, int, int, int], bandwidth: float, rate: float) -> list[Any]:
        """A row of the table."""
        import torch

        from online_dpo.rollout.builtin.engine import TransformersEngine

        way = WAYS[name]
        prompts, k, length, new = point
        model = self.of_way(way)
        engine = TransformersEngine(model, self.tokenizer, prompts * k, static_steps=way.get("static", False))
        on_card = self.device == "cuda"
        if on_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast(self.device, torch.bfloat16):
            whole = self.seconds(engine, point, new, way.get("extra", {}))
            prefill = self.seconds(engine, point, 1, way.get("extra", {}))
        assert engine.batch_size == prompts * k, "memory ran out, and fewer completions were sampled at a time"
        taken = engine._path if not way.get("extra") else "generate"
        wanted = {True: "static", False: "dynamic", None: "generate"}[way.get("static")]
        assert taken == wanted, f"the way that was taken is {taken}; the log says why"
        graphs, peak = engine._buffers.graphs.captured, torch.cuda.max_memory_allocated() / MIB if on_card else None
        engine.close()
        step = max((whole - prefill) / (new - 1), 1e-9)
        sizes = (self.shape, prompts, k, length, new)
        least = max(bytes_a_step(*sizes) / (bandwidth * 1e9), flop_a_step(*sizes) / (rate * 1e9))
        speed, nominal = bytes_a_step(*sizes) / step / 1e9, nominal_bandwidth()
        shares = [speed / bandwidth, speed / nominal if nominal else None, least / step]
        return [name, *point, prefill, step * 1000, prompts * k / step, *shares, graphs, peak]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-0.5b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--few", action="store_true", help="one small point for each way")
    options = parser.parse_args()
    from trainers import let_static_caches_hold_two_dtypes

    let_static_caches_hold_two_dtypes()
    bandwidth, rate = copy_bandwidth(options.device), matrix_rate(options.device, "bfloat16")
    measurement = Measurement(options.model, options.device, options.repetitions)
    rows: list[list[Any]] = []
    failures: list[str] = []
    ours = [(name, point) for name in ("static", "dynamic") for point in POINTS]
    theirs = [(name, point) for name in ("generate, static cache", "generate") for point in POINTS[:SLOW]]
    lora = [("static, LoRA", point) for point in POINTS[:SLOW]]  # last: the adapter stays in the model
    wanted = [(name, (2, 2, 12, 8)) for name in WAYS if name != "static, LoRA"] + [("static, LoRA", (2, 2, 12, 8))]
    for name, point in wanted if options.few else [*ours, *theirs, *lora]:
        try:
            rows.append(measurement.row(name, point, bandwidth, rate))
        except Exception as error:  # whatever it is: the other points are still of use, and the part fails at the end
            traceback.print_exc()
            failures.append(f"{name} {point}: {type(error).__name__}: {str(error)[:300]}")
        else:
            print(*rows[-1], flush=True)
        note = f"Copying {bandwidth:.0f} GB/s, products in bf16 {rate / 1000:.0f} TFLOP/s, measured in this process."
        made = table(f"Decoding, {options.model}", COLUMNS, rows, note, *(f"Failed: {text}" for text in failures))
        write_tables(options.json, [made])
    if failures:
        raise SystemExit("\n".join(["Some points failed.", *failures]))


if __name__ == "__main__":
    main()
