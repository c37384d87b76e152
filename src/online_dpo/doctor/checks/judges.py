"""The judge: one question to it, with seconds, tokens and the price of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from online_dpo.config.llm_judge import JudgeSettings
from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, ok, problem, warning
from online_dpo.doctor.registry import check
from online_dpo.errors import FeedbackStopped, error_text
from online_dpo.scoring.judges.llm.judge import LLMJudge
from online_dpo.scoring.judges.tournament import find_preferences
from online_dpo.types import Completion, Group, Prompt

PATIENCE = 30.0
"""Seconds that one question may take here."""
ANSWERS = ("I do not know.", "That depends on what you want to know. In short: yes, with a few exceptions.")
"""Two answers to ask about, where none was sampled."""
SLOW = 300.0
"""Seconds a step that a judge may take without a word."""
ASKED = 4
"""Groups that a judge other than one over HTTP is asked about."""


@check("judge")
def judge(case: Case) -> Iterator[Finding]:
    """Asks the judge about two answers, and that of the evaluations."""
    subject = case.subject
    if subject.llm_judge is not None and (case.args.judge_top or not subject.has_rewards):
        yield from _ask(case, subject.llm_judge, "judge_kwargs", _price)
    elif subject.asks_people:
        yield ok("people compare, in the dashboard: `online-dpo dashboard`")
    elif subject.quick or case.trainer.judge is None:
        yield ok("no judge is asked over HTTP in training")
    else:
        yield from _local(case)
    if subject.llm_eval_judge is not None:
        yield from _ask(case, subject.llm_eval_judge, "eval_judge_kwargs", _of_evaluations)


Told = Callable[[Case, JudgeSettings, float, Mapping[str, float]], Finding]
"""Says what follows from a question that took some seconds, and from what was counted meanwhile."""


def _ask(case: Case, given: Mapping[str, Any], field: str, told: Told) -> Iterator[Finding]:
    settings, group = JudgeSettings(**given), _pair(case)
    patient = {"request_timeout": min(PATIENCE, settings.request_timeout), "question_timeout": PATIENCE}
    asked = LLMJudge(**{**given, **patient, "cache": None, "attempts": 2, "max_failure_share": 1.0})
    began = time.perf_counter()
    try:
        with case.quietly():
            [answer] = asked.prefer([group])
    except FeedbackStopped as stopped:
        found, _, change = error_text(stopped).partition(". ")
        yield problem(found, change or f"Correct `model`, `base_url` or the key (`api_key_env`) in `{field}`.")
        return
    seconds, counts = time.perf_counter() - began, asked.drain().sums
    if answer is None:
        yield problem(
            f"the judge {settings.model} at {settings.base_url} gave no verdict: {asked.last_failure}",
            f"Correct `model` and `base_url` in `{field}`, and see that the endpoint runs; for answers without a "
            "verdict, raise `max_tokens` or change `template`.",
        )
        return
    yield told(case, settings, seconds, counts)


def _of_evaluations(case: Case, settings: JudgeSettings, seconds: float, counts: Mapping[str, float]) -> Finding:
    return ok(f"{settings.model}, which compares in evaluations, answered in {seconds:.1f} s", seconds=seconds)


def _price(case: Case, settings: JudgeSettings, seconds: float, counts: Mapping[str, float]) -> Finding:
    """What a step costs: as many comparisons as a tournament of K completions has at most."""
    k = case.args.judge_top or case.args.num_completions
    comparisons = case.prompts_per_step * min(k * (k - 1) // 2, -(-3 * k // 2) - 1)
    tokens = {name: counts.get(f"judge/{name}", 0.0) * comparisons for name in ("input_tokens", "output_tokens")}
    questions = counts.get("judge/requests", 1.0) * comparisons
    price = settings.cost(round(tokens["input_tokens"]), round(tokens["output_tokens"]))
    a_step = seconds * comparisons / max(1, min(settings.concurrency, round(questions)))
    facts: dict[str, Any] = {"seconds": seconds, "questions_a_step": questions, "price_a_step": price, **tokens}
    cost = f", {price:.4g} in the currency of the prices" if price else ""
    found = (
        f"{settings.model} answered in {seconds:.1f} s; a step asks {questions:.0f} questions: about "
        f"{tokens['input_tokens']:.0f} tokens read, {tokens['output_tokens']:.0f} written{cost}, {a_step:.0f} s"
    )
    whole = None if case.steps is None else price * case.steps
    if settings.max_cost is not None and whole is not None and whole > settings.max_cost:
        return warning(
            f"{found}; the run's {case.steps} steps would cost {whole:.4g}, and it stops at `max_cost`, "
            f"{settings.max_cost:g}",
            "Raise `max_cost`, or lower `max_steps`, `num_completions`, or `judge_top`.",
            **facts,
        )
    if a_step > SLOW:
        return warning(found, "Raise `concurrency`, or lower `num_completions`.", **facts)
    return ok(found + ("" if not whole else f"; the run about {whole:.4g}"), **facts)


def _pair(case: Case) -> Group:
    """Two answers to a prompt of the run: sampled ones, or others."""
    if not case.subject.quick:
        for group in case.sampled.groups:
            first, *others = group.completions
            different = [one for one in others if one.text != first.text]
            if different:
                return Group(group.prompt, (first, different[0]))
    prompt: Prompt = case.prompts[0]
    return Group(prompt, tuple(Completion((0,), (0.0,), "stop", 0, text) for text in ANSWERS))


def _local(case: Case) -> Iterator[Finding]:
    """Asks a judge that is a model here, or the user's own."""
    asked: Any = case.trainer.judge
    groups = case.sampled.groups[:ASKED]
    began = time.perf_counter()
    preferences = find_preferences(groups, asked).preferences
    seconds = time.perf_counter() - began
    missing = sum(one is None for one in preferences)
    if missing == len(preferences):
        yield problem(f"judge `{asked.name}` has no preference in any of {missing} groups", "Look at what it returns.")
    else:
        yield ok(f"judge `{asked.name}`: {len(groups) - missing} of {len(groups)} groups judged, {seconds:.1f} s")
