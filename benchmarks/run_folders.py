"""Makes run folders with invented content, to try the dashboard and the report on many and large ones.

    python benchmarks/run_folders.py runs/made --runs 50 --rows 1000 --groups 400 --seed 0

Rewards rise, lengths grow with them, judges disagree now and then, and some texts are hostile.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from online_dpo.runs import frames
from online_dpo.runs.layout import ENVIRONMENT, EVENTS, METRICS, SETTINGS, CompletionsFile

WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "small",
    "large",
    "answer",
    "question",
    "because",
    "number",
    "seven",
    "house",
    "river",
    "is",
    "was",
    "has",
    "grows",
    "falls",
    "kind",
]
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "{{ 7 * 7 }}",
    "\u202eright to left",
    "](javascript:x)",
]
FRAME_BYTES = 64 << 20


def make(folder: Path, rows: int, groups: int, seed: int, *, judged: bool = False, state: str = "finished") -> Path:
    """Make one run folder with ``rows`` logs and ``groups`` groups of four completions; returns it."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time() - 10 * rows
    settings = {"model_name_or_path": "tiny-policy", "learning_rate": rng.choice([1e-6, 5e-6, 1e-5]), "beta": 0.1}
    settings |= {"num_completions": 4, "seed": seed, "max_steps": rows, "output_dir": str(folder)}
    (folder / SETTINGS).write_text("# Written by benchmarks/run_folders.py\n" + yaml.safe_dump(settings))
    session = {"versions": {"online_dpo": "0", "torch": "0"}, "processes": 1, "start": began}
    (folder / ENVIRONMENT).write_text(json.dumps({"sessions": [session]}))
    _write_lines(folder / METRICS, (_metrics(step, rows, began, rng) for step in range(1, rows + 1)))
    _write_lines(folder / EVENTS, _events(rows, began, rng, state))
    _write_completions(folder, rows, groups, rng, judged)
    return folder


def append_step(folder: Path, step: int, rows: int, seed: int = 0, groups: int = 2) -> None:
    """Write one more step into a folder, as a run that is alive does: groups first, then the log."""
    rng = random.Random(seed * 1_000_003 + step)
    with (folder / CompletionsFile(0, 0).name).open("ab", buffering=0) as file:
        file.write(frames.encode([_group(step, index, rows, rng, False) for index in range(groups)]))
    with (folder / METRICS).open("ab", buffering=0) as file:
        file.write(json.dumps(_metrics(step, rows, time.time() - 10 * step, rng)).encode() + b"\n")


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _metrics(step: int, rows: int, began: float, rng: random.Random) -> dict[str, Any]:
    share = step / rows
    reward = 2 * share + rng.gauss(0, 0.15)
    return {
        **{"step": step, "epoch": round(share, 4), "time": began + 10 * step, "kind": "train"},
        **{"loss": 0.69 - 0.3 * share + rng.gauss(0, 0.02), "objective/scores": reward, "objective/kl": 6 * share**2},
        **{"rewards/chosen": reward / 2, "rewards/rejected": -reward / 2, "rewards/margins": reward},
        **{
            "rewards/accuracies": min(1.0, 0.5 + 0.4 * share + rng.gauss(0, 0.05)),
            "grad_norm": rng.lognormvariate(0, 0.3),
        },
        **{"logps/chosen": -20 + share, "logps/rejected": -22 - share, "val/contain_eos_token": 0.9 + 0.1 * share},
        **{"completions/mean_length": 20 + 30 * share, "learning_rate": 1e-6 * (1 - share), "prompts": 16.0},
        **{"time/rollout": 2.0, "time/scoring": 0.5, "time/reference": 0.6, "time/training": 2.5, "dropped/tie": 1.0},
        **{"perf/tokens_per_second": 900 + rng.gauss(0, 40), "perf/memory_host_mb": 1500.0},
    }


def _events(rows: int, began: float, rng: random.Random, state: str) -> Iterator[dict[str, Any]]:
    def event(step: int, kind: str, message: str, **facts: Any) -> dict[str, Any]:
        return {"time": began + 10 * step, "step": step, "rank": 0, "kind": kind, "message": message, **facts}

    yield event(0, "start", "The run begins.", pid=0, host="made")
    for step in range(1, rows + 1):
        if step % 100 == 0:
            yield event(step, "checkpoint", f"Checkpoint saved in checkpoint-{step}.")
        if rng.random() < 0.003:
            kind = rng.choice(["skip", "out_of_memory", "retry"])
            yield event(step, kind, f"Something of kind {kind} has happened.")
    if state != "running":
        yield event(rows, "end", f"The run has {state}.", code=0 if state == "finished" else 1, state=state)


def _write_completions(folder: Path, rows: int, groups: int, rng: random.Random, judged: bool) -> None:
    per_step = max(1, math.ceil(groups / rows))
    number, size, made = 0, 0, 0
    for step in range(1, rows + 1):
        if made >= groups:
            return
        indices = range(min(per_step, groups - made))
        frame = frames.encode([_group(step, index, rows, rng, judged) for index in indices])
        with (folder / CompletionsFile(0, number).name).open("ab") as file:
            file.write(frame)
        made, size = made + len(indices), size + len(frame)
        if size > FRAME_BYTES:
            number, size = number + 1, 0


def _group(step: int, index: int, rows: int, rng: random.Random, judged: bool) -> dict[str, Any]:
    row = rng.randrange(200)
    completions = [_completion(step, rows, rng, judged) for _ in range(4)]
    group: dict[str, Any] = {
        **{"step": step, "rank": 0, "index": index, "round": 0},
        **{"prompt": f"Question {row}: {_text(random.Random(row), 12)}?", "prompt_row": row, "prompt_length": 15},
        **{"completions": completions},
    }
    reason = rng.choice(["tie", "identical", "missing_score", "margin"]) if rng.random() < 0.15 else None
    if reason:
        return group | {"pairs": [], "reason": reason}
    order = sorted(range(4), key=lambda k: completions[k]["score"] or rng.random())
    chosen, rejected = order[-1], order[0]
    for k in (chosen, rejected):
        _trained(completions[k], rng)
    margin = None if judged else completions[chosen]["score"] - completions[rejected]["score"]
    implied = rng.gauss(0.3 * step / rows, 0.4)
    pair = {"chosen": chosen, "rejected": rejected, "probability": 1.0, "margin": margin, "weight": 1.0}
    group["pairs"] = [pair | {"loss": math.log1p(math.exp(-implied)), "implied": implied}]
    return group | ({"comparisons": [_comparison(chosen, rejected, rng)]} if judged else {})


def _completion(step: int, rows: int, rng: random.Random, judged: bool) -> dict[str, Any]:
    length = max(2, int(rng.gauss(20 + 30 * step / rows, 8)))
    text = rng.choice(HOSTILE) if rng.random() < 0.01 else _text(rng, length)
    completion: dict[str, Any] = {"text": text, "length": length, "finish": rng.choices(["stop", "length"], [9, 1])[0]}
    completion |= {"author": "policy", "version": step - 1, "sampled_logp": -1.2 * length}
    if judged:
        return completion | {"rewards": {}, "score": None}
    helpful, short = rng.gauss(2 * step / rows, 1), -0.01 * length
    rewards = {"helpful": helpful, "short": short}
    return completion | {"rewards": rewards, "weighted": rewards, "score": helpful + short}


def _trained(completion: dict[str, Any], rng: random.Random) -> None:
    pieces = completion["text"].split(" ")
    completion["tokens"] = [piece if n == 0 else f" {piece}" for n, piece in enumerate(pieces)]
    completion["log_ratios"] = [round(rng.gauss(0.02, 0.2), 4) for _ in pieces]
    completion["logp"] = completion["sampled_logp"] + 0.1
    completion["ref_logp"] = completion["logp"] - sum(completion["log_ratios"])


def _comparison(first: int, second: int, rng: random.Random) -> dict[str, Any]:
    forward = rng.betavariate(4, 2)
    backward = min(1.0, max(0.0, forward - abs(rng.gauss(0.1, 0.2))))
    orders = [
        {"shown": shown, "probability": p, "words": f"Answer 1 is {_text(rng, 6)}.", "seconds": 0.8, "tokens": 400}
        for shown, p in (
            ([first, second], forward),
            ([second, first], 1 - backward),
        )  # that the one shown first is better
    ]
    return {"first": first, "second": second, "probability": (forward + backward) / 2, "orders": orders}


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def main() -> None:
    """Make the folders that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000, help="logs of each run")
    parser.add_argument("--groups", type=int, default=400, help="groups of each run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for number in range(args.runs):
        state = ("finished", "stopped", "failed", "running")[number % 4]
        seed = args.seed + number
        made = make(args.folder / f"run-{number:02}", args.rows, args.groups, seed, judged=number % 3 == 2, state=state)
        print(made)


if __name__ == "__main__":
    main()
