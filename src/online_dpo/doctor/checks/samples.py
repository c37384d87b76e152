"""A few completions of the policy: whether they end, and whether those of one prompt differ."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, ok, problem, warning
from online_dpo.doctor.registry import check

ENOUGH = 16
"""Completions from which something can be said of all."""


@check("samples", loads_models=True)
def samples(case: Case) -> Iterator[Finding]:
    """Completions of a few prompts: their ends, their lengths, their variety."""
    groups = case.sampled.groups
    completions = [one for group in groups for one in group.completions]
    lengths = [len(one.token_ids) for one in completions]
    ended = fmean(one.finish_reason == "stop" for one in completions)
    equal = fmean(len({one.text for one in group.completions}) == 1 for group in groups)
    empty = fmean(not one.text.strip() for one in completions)
    facts = {"completions": len(completions), "ended": ended, "mean_length": fmean(lengths), "equal": equal}
    found = f"{len(completions)} completions of {min(lengths)} to {max(lengths)} tokens"
    bad = list(_bad(case, found, len(completions), ended, equal, empty))
    yield from bad
    if not bad:
        yield ok(f"{found}; {ended:.0%} ended by themselves", **facts)


def _bad(case: Case, found: str, count: int, ended: float, equal: float, empty: float) -> Iterator[Finding]:
    if equal == 1:
        yield problem(
            f"{found}: those of each prompt are all the same, so that there is no pair",
            "Raise `temperature`, and leave `top_k` and `top_p` wider.",
        )
    if empty > 0.5:
        yield problem(
            f"{found}: {empty:.0%} are empty",
            "The policy ends at once: look at the chat template, `prompt_template`, and the policy's end tokens.",
        )
    elif ended == 0 and count >= ENOUGH:
        yield warning(
            f"{found}: none ended before `max_new_tokens` ({case.args.max_new_tokens})",
            "A base model may not know when to end: take one that was tuned on answers, raise `max_new_tokens`, or set "
            "`missing_eos_penalty`. Look at the end tokens, too.",
        )
