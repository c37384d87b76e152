"""A checkpoint knows its run: other options, data, models and scorers, a folder that is taken, hostile files; and a
failed step that was sampled ahead.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.damage import all_of, removed, stopped_after, written
from faults.harness import ANY, Fault, OneLine, Resumes, Survived, scorer

RESUME = ("--resume_from_checkpoint", "true")
ANYWAY = (*RESUME, "--resume_anyway")
SAVES = {"save_steps": 1}


class Hostile:
    """What an attacker would have unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("CODE OF THE CHECKPOINT HAS RUN",))


def other(name: str, value: Any, was: Any = None, **options: Any) -> Fault:
    """A run with another option than the checkpoint's, which was made without it, or with ``was``."""
    return Fault(
        "resumed with others",
        name,
        OneLine(2, "computes something else", f"{name}: checkpoint has", "resume_anyway"),
        options={**SAVES, **options, name: value},
        trained={name: was},
        prepare=stopped_after(2),
        words=RESUME,
    )


def changed_line(name: str, number: int, text: str) -> Callable[[Path], None]:
    """One line of a file is another."""

    def change(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        lines[number] = text
        (folder / name).write_text("\n".join(lines) + "\n")

    return change


def unknown(file: str, data: str | bytes) -> Callable[[Path], None]:
    """A file of the checkpoint is another, and the manifest that would tell is gone."""
    return all_of(
        stopped_after(2), written(f"out/checkpoint-2/{file}", data), removed("out/checkpoint-2/manifest.json")
    )


def damaged(file: str, what: str, data: str | bytes, *words: str, **options: Any) -> Fault:
    """Without a manifest, as an attacker would leave it, a file is read and checked for itself."""
    return Fault(
        "hostile checkpoint",
        f"{file} {what}",
        OneLine(2, *(words or (file, "damaged"))),
        options={**SAVES, **options},
        trained={},
        prepare=unknown(file, data),
        words=("--resume_from_checkpoint", "out/checkpoint-2"),
    )


AHEAD = {"max_staleness": 1}
DEEP = "[" * 100_000

FAULTS = [
    other("seed", 1),
    other("num_completions", 3, was=2),
    other("learning_rate", 0.5, was=0.01),
    other("lr_scheduler_type", "cosine", was="constant"),
    other("beta", 0.7),
    other("temperature", 0.5),
    other("loss_type", "ipo"),
    other("max_new_tokens", 4, was=3),
    other("max_staleness", 2, was=1),
    other("weight_decay", 0.1),
    Fault(
        "resumed with others",
        "another row of data",
        OneLine(2, "train_dataset: checkpoint has", "resume_anyway"),
        options=SAVES,
        trained={},
        prepare=all_of(stopped_after(2), changed_line("data.jsonl", 3, json.dumps({"prompt": "w3 w4 w5"}))),
        words=RESUME,
    ),
    Fault(
        "resumed with others",
        "all the same",
        Survived("Resuming from", "seed: checkpoint has", like=ANY),
        options={**SAVES, "seed": 1},
        trained={"seed": None},
        prepare=stopped_after(2),
        words=ANYWAY,
    ),
    Fault(
        "resumed with others",
        "only files and logs",
        Survived(),
        options={**SAVES, "save_total_limit": 2},
        trained={"save_total_limit": None},
        prepare=stopped_after(2),
        words=RESUME,
    ),
    Fault(
        "a taken folder",
        "of another seed",
        OneLine(2, "holds checkpoint-1 to checkpoint-", "another run (seed:", "resume", "overwrite_output_dir"),
        options={**SAVES, "seed": 1},
        trained={"seed": None},
    ),
    Fault(
        "a taken folder",
        "of a run that is not over",
        OneLine(2, "holds checkpoint-1 to checkpoint-2", "not over", "resume", "overwrite_output_dir"),
        options=SAVES,
        trained={},
        prepare=stopped_after(2),
    ),
    Fault("a taken folder", "of the same run that is over", Survived("starts anew"), options=SAVES, trained={}),
    Fault(
        "a taken folder",
        "overwritten",
        Survived(),
        options={**SAVES, "seed": 1},
        trained={"seed": None},
        words=("--overwrite_output_dir",),
    ),
    damaged("lookahead-0.json", "of another type", '{"kind": "SavedSteps", "steps": [{"kind": "print"}]}', **AHEAD),
    damaged("lookahead-0.json", "100000 deep", DEEP, **AHEAD),
    damaged("lookahead-0.json", "is a pickle", pickle.dumps(Hostile()), **AHEAD),
    damaged("guard.json", "is a list", "[1]"),
    damaged("guard.json", "100000 deep", DEEP),
    damaged("beta.json", "is NaN", '{"beta": NaN}', target_kl=1.0),
    damaged("reference.safetensors", "is a pickle", pickle.dumps(Hostile()), sync_ref_model=True),
    damaged("metrics-0.json", "is cut off", '{"kind": "SinceLastLog", "sums": {"a": '),
    Fault(
        "hostile checkpoint",
        "lookahead-0.pt of an earlier version",
        OneLine(2, "lookahead-0.pt", "earlier version", "pickle", "resume_anyway"),
        options={**SAVES, **AHEAD},
        trained={},
        prepare=all_of(
            unknown("lookahead-0.pt", pickle.dumps(Hostile())), removed("out/checkpoint-2/lookahead-0.json")
        ),
        words=("--resume_from_checkpoint", "out/checkpoint-2"),
    ),
    *(
        Fault(
            "a step ahead fails",
            f"{what}, call {call}, {ahead} ahead",
            Resumes(OneLine(1, "ConnectionError", "away")),
            options={"max_staleness": ahead, **more},
            files={"feedback.py": scorer(f"if calls == {call}: raise ConnectionError('away')")},
            processes=processes,
            quick=call == ahead + 1 and (processes == 1 or ahead == 1),
        )
        for what, more, processes in (
            ("one process", {}, 1),
            ("saves", SAVES, 1),
            ("two ranks", {}, 2),
            ("a log of several steps", {"logging_steps": 3}, 1),
        )
        for call in (2, 3)
        for ahead in (1, 2)
    ),
]
