"""How long a step and the run take, from the sampled completions and one pass of training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, ok, warning
from online_dpo.doctor.registry import check
from online_dpo.training.display.figures import duration
from online_dpo.types import Group, Pair

WEEK = 7 * 24 * 3600
SLOW_SCORER, SECONDS = 3.0, 1.0
"""A scorer is slow if it takes so many times as long as the rest, and more than so many seconds."""


@check("time", loads_models=True)
def timing(case: Case) -> Iterator[Finding]:
    """Seconds of a step in one process, by phase; and of the run."""
    share = case.prompts_per_step / case.subject.processes / len(case.sampled.groups)
    seconds = {
        "sampling": case.sampled.seconds * share,
        "scoring": case.scoring_seconds * share,
        "training": training_seconds(case) * share,
    }
    step, steps = sum(seconds.values()), case.steps
    parts = ", ".join(f"{name} {part:.2g} s" for name, part in seconds.items())
    found = f"about {step:.2g} s a step ({parts})"
    found += "" if steps is None else f", {duration(step * steps)} for {steps} steps"
    facts = {**seconds, "step": step, "steps": steps}
    others = seconds["sampling"] + seconds["training"]
    if seconds["scoring"] > max(SECONDS, SLOW_SCORER * others):
        yield warning(
            f"{found}: rewards take {seconds['scoring'] / step:.0%} of it",
            "Make the reward faster (batches, an async function), or score beside training with `max_staleness: 1`.",
            **facts,
        )
    elif steps is not None and step * steps > WEEK:
        yield warning(found, "Lower `max_steps`, `num_completions` or `max_new_tokens`, or use more GPUs.", **facts)
    else:
        yield ok(found, **facts)


def training_seconds(case: Case) -> float:
    """Seconds of passes over a pair of each group, whichever of the two is chosen. Nothing is updated."""
    trainer, groups = case.trainer, case.sampled.groups
    pairs = [pair for group in groups if (pair := _any_pair(group)) is not None]
    if not pairs:
        return 0.0
    model: Any = trainer.model
    [inputs] = trainer.objective.pack(model, pairs, 1)
    model.train()
    began = time.perf_counter()
    for rows in inputs["passes"]:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, {"rows": rows}, num_items_in_batch=len(pairs))
        loss.backward()
    seconds = time.perf_counter() - began
    model.zero_grad()
    return seconds


def _any_pair(group: Group) -> Pair | None:
    other = next(
        (k for k, one in enumerate(group.completions) if one.token_ids != group.completions[0].token_ids), None
    )
    return None if other is None else Pair(group, 0, other)
