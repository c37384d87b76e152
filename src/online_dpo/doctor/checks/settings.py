"""The configuration of the run, as the trainer takes it."""

from __future__ import annotations

from collections.abc import Iterator

from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, ok
from online_dpo.doctor.registry import check


@check("settings")
def settings(case: Case) -> Iterator[Finding]:
    """The fields of the trainer's configuration, their ranges, and whether they go together."""
    args = case.args
    yield ok(
        f"{case.prompts_per_step} prompts a step, {args.num_completions} completions of up to {args.max_new_tokens} "
        f"tokens each, by the engine {args.engine_name}"
    )
