"""No fault at all, as many ways of running as faults are injected into: the harness itself is right."""

from __future__ import annotations

from faults.harness import Fault, Survived

WAYS = {
    "one process": {},
    "lookahead": dict(max_staleness=1),
    "evaluation": dict(eval_dataset_name="data.jsonl", eval_strategy="steps", eval_steps=2),
    "rotation": dict(save_steps=1, save_total_limit=1),
    "an adapter": dict(use_peft=True),
    "accumulation": dict(gradient_accumulation_steps=2),
}

FAULTS = [
    *(Fault("none", name, Survived(like=None), options=options) for name, options in WAYS.items()),
    Fault("none", "two processes", Survived(), processes=2),
]
