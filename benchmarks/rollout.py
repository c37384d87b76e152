"""Sampling alone: tokens a second of the built-in engine, of `generate`, and of vLLM, at several sizes.

    python benchmarks/rollout.py --engine built-in generate --prompts 8 --completions 2 8 --prompt 128 --new 128

All engines sample with the same weights from the same prompts; completions go on to the given length. The share of the
limit is the time that reading the weights once a token and the keys and values of each prompt once and of each
completion would take at the machine's memory bandwidth, over the time that was needed; prefilling counts as matrix
products at the machine's matrix rate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from measure import describe_machine, group_forward_flop, matrix_rate, versions
from vs_trl import refuse
from workloads import EOS, FIRST_WORD, MODELS, PAD, Shape

ENGINES: dict[str, dict[str, Any]] = {
    "built-in": {},
    "built-in-static": {},
    "built-in-dynamic": {},
    "generate": {"no_repeat_ngram_size": 0},  # an option that changes nothing, and that only `generate` knows
    "generate-static": {"cache_implementation": "static"},
    "vllm": {},
    "continuous-batching": {},
}
"""The `generation_kwargs` that make the built-in engine take each way."""

STATIC_STEPS = {"built-in-static": True, "built-in-dynamic": False}
"""Whether steps have static shapes, which a GPU replays as CUDA graphs; the others leave it to the engine."""

MOST_POSITIONS = 4096


def memory_bandwidth(device: str, seconds: float = 0.5) -> float:
    """GB/s of reading: the best of several passes over an array that no cache holds."""
    import torch

    data = torch.ones(2**26 if device == "cpu" else 2**29, device=device)
    best, begin = 0.0, time.perf_counter()
    while time.perf_counter() < begin + seconds:
        start = time.perf_counter()
        data.sum().item()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best / 1e9


def least_seconds(
    shape: Shape,
    prompts: int,
    completions: int,
    prompt: int,
    new: int,
    number_bytes: int,
    bandwidth: float,
    rate: float,
) -> float:
    """What sampling ``new`` tokens of each completion cannot take less than."""
    weights = shape.layers * shape.layer_weights + shape.hidden * shape.vocabulary
    kv_numbers = 2 * shape.layers * shape.kv_width
    read_per_step = weights + kv_numbers * prompts * prompt
    own = kv_numbers * prompts * completions * sum(range(1, new))
    decode = number_bytes * (read_per_step * (new - 1) + own) / (bandwidth * 1e9)
    return decode + prompts * group_forward_flop(shape, prompt, [], head=False) / (rate * 1e9)


def engine_and_sampler(name: str, shape: Shape, options: argparse.Namespace, most: int) -> tuple[Any, Any, Any]:
    """The engine, its model, and a function from ``max_new_tokens`` to sampling options."""
    import torch
    from workloads import make_policy, make_tokenizer

    from online_dpo import OnlineDPOConfig
    from online_dpo.rollout.builtin.engine import TransformersEngine
    from online_dpo.rollout.params import SamplingParams
    from online_dpo.rollout.vllm.colocated_engine import VLLMColocateEngine

    model = make_policy(shape, options.device).to(getattr(torch, options.dtype)).eval()
    tokenizer = make_tokenizer(shape)
    if name == "continuous-batching":
        engine: Any = ContinuousBatching(model)
    elif name == "vllm":
        args = OnlineDPOConfig(
            output_dir="unused",
            use_cpu=options.device == "cpu",
            bf16=options.dtype == "bfloat16",
            rollout_batch_size=most,
            max_length=MOST_POSITIONS,
            report_to=[],
        )
        engine = VLLMColocateEngine(model, tokenizer, args)
    else:
        engine = TransformersEngine(model, tokenizer, batch_size=most, static_steps=STATIC_STEPS.get(name))
    engine.sync(model, 0)

    def sampling(new: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=new, end_token_ids=(EOS,), extra=ENGINES[name])

    return engine, model, sampling


class ContinuousBatching:
    """The continuous batching of transformers, asked as an engine is. It samples with random numbers of its own and
    returns no log-probabilities, so it is here to be compared and nothing else.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def sync(self, model: Any, version: int) -> None: ...

    def close(self) -> None: ...

    def generate(self, prompts: list[Any], num_completions: int, params: Any, key: Any) -> list[Any]:
        from transformers import GenerationConfig

        from online_dpo.types import Completion, Group

        config = GenerationConfig(
            max_new_tokens=params.max_new_tokens,
            do_sample=True,
            top_k=0,
            num_return_sequences=num_completions,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        outputs = self.model.generate_batch([list(p.token_ids) for p in prompts], generation_config=config)
        if len(outputs) != len(prompts) * num_completions:
            raise RuntimeError(f"{len(outputs)} completions came back of {len(prompts) * num_completions}")
        completions = tuple(Completion(tuple(o.generated_tokens), (), "stop", 0, "") for o in outputs.values())
        return [Group(prompts[0], completions)]  # whose they are does not matter here


def measure(
    name: str, engine: Any, sampling: Callable[[int], Any], options: argparse.Namespace, shape: Shape
) -> list[dict[str, Any]]:
    import random

    import torch

    from online_dpo.rollout.params import RolloutKey
    from online_dpo.types import Prompt

    rows = []
    for prompts in options.prompts:
        for k in options.completions:
            for length in options.prompt:
                for new in options.new:
                    seconds, tokens = [], []
                    for step in range(options.repetitions + 1):
                        draw = random.Random(step)
                        given = [
                            Prompt("", tuple(draw.choices(range(FIRST_WORD, shape.vocabulary), k=length)), row)
                            for row in range(prompts)
                        ]
                        start = time.perf_counter()
                        groups = engine.generate(given, k, sampling(new), RolloutKey(0, step))
                        if options.device == "cuda":
                            torch.cuda.synchronize()
                        seconds.append(time.perf_counter() - start)
                        tokens.append(sum(len(c.token_ids) for group in groups for c in group.completions))
                    took, sampled = median(seconds[1:]), median(tokens[1:])  # the first one is to warm up
                    rows.append(
                        {
                            "engine": name,
                            "prompts": prompts,
                            "completions": k,
                            "prompt_tokens": length,
                            "new_tokens": new,
                            "seconds": took,
                            "tokens_per_second": sampled / took,
                        }
                    )
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="sampling")
    for title in ("engine", "prompts", "completions", "prompt", "new", "seconds", "tokens/s", "share of the limit"):
        table.add_column(title, justify="left" if title == "engine" else "right")
    for row in rows:
        counts = [str(row[key]) for key in ("prompts", "completions", "prompt_tokens", "new_tokens")]
        table.add_row(
            row["engine"],
            *counts,
            f"{row['seconds']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['limit_share']:.0%}",
        )
    Console(width=120, highlight=False).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engine", nargs="+", choices=list(ENGINES), default=["built-in", "generate"], metavar="NAME")
    add("--model", choices=list(MODELS), default="small", metavar="NAME", help=", ".join(MODELS))
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    add("--prompts", nargs="+", type=int, default=[8], metavar="N")
    add("--completions", nargs="+", type=int, default=[2, 8], metavar="K", help="of each prompt")
    add("--prompt", nargs="+", type=int, default=[128, 512], metavar="TOKENS")
    add("--new", nargs="+", type=int, default=[128], metavar="TOKENS")
    add("--repetitions", type=int, default=3, metavar="N")
    add("--threads", type=int, default=None, metavar="N", help="default: all cores")
    add("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    numbers = [*options.prompts, *options.completions, *options.prompt, *options.new, options.repetitions]
    if min(numbers) < 1:
        refuse("numbers must be at least 1")
    if max(options.prompt) + max(options.new) > MOST_POSITIONS:
        refuse(f"prompt and new tokens together must be at most {MOST_POSITIONS}")
    if "vllm" in options.engine and importlib.util.find_spec("vllm") is None:
        refuse("vllm is not installed here")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        refuse(f"--json {options.json}: its folder must exist")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch finds no CUDA device here")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.threads = torch.get_num_threads()
    return options


def main() -> None:
    options = parse()
    shape = MODELS[options.model]
    bandwidth, rate = memory_bandwidth(options.device), matrix_rate(options.device, options.dtype)
    number_bytes = 2 if options.dtype == "bfloat16" else 4
    rows: list[dict[str, Any]] = []
    for name in options.engine:
        print(name, file=sys.stderr)
        engine, model, sampling = engine_and_sampler(
            name, shape, options, max(options.prompts) * max(options.completions)
        )
        rows += measure(name, engine, sampling, options, shape)
        engine.close()
        del engine, model
    for row in rows:
        sizes = [row[key] for key in ("prompts", "completions", "prompt_tokens", "new_tokens")]
        row["limit_share"] = least_seconds(shape, *sizes, number_bytes, bandwidth, rate) / row["seconds"]
    print_rows(rows)
    if options.json is not None:
        header = {
            "device": describe_machine(options.device, options.threads),
            "versions": versions(),
            "command": " ".join(["python", "benchmarks/rollout.py", *sys.argv[1:]]),
            "model": options.model,
            "dtype": options.dtype,
            "bandwidth_gbs": bandwidth,
            "matrix_rate_gflops": rate,
        }
        options.json.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
