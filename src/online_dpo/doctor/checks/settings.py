"""The configuration of the run, as the trainer takes it."""

from __future__ import annotations

from collections.abc import Iterator

from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, ok, problem
from online_dpo.doctor.registry import check

HIGHEST_RATE = 1e-2
"""A learning rate above this ruins a language model within a few steps, whatever the optimizer of transformers."""


@check("settings")
def settings(case: Case) -> Iterator[Finding]:
    """The fields of the trainer's configuration, their ranges, and whether they go together."""
    args = case.args
    if args.learning_rate > HIGHEST_RATE:
        yield problem(
            f"a learning rate of {args.learning_rate:g} ruins a language model within a few steps",
            "Set `learning_rate` to 1e-7 to 1e-5 where all weights are trained, to 1e-5 to 5e-4 for an adapter.",
        )
    yield ok(
        f"{case.prompts_per_step} prompts a step, {args.num_completions} completions of up to {args.max_new_tokens} "
        f"tokens each, by the engine {args.engine_name}"
    )
