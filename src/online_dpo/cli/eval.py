"""``online-dpo eval``: compare two models on held-out prompts. This module checks the arguments."""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.cli.evaluation.plan import EvalPlan, plan_eval
from online_dpo.cli.runfile.help import EVAL_USAGE, eval_help
from online_dpo.cli.runfile.planning import run_checked


def evaluate(words: Sequence[str]) -> int:
    """Evaluate and report. Returns the exit code: 0, 1 (scoring failed) or 2 (wrong input)."""
    return run_checked(words, usage=EVAL_USAGE, help=eval_help, plan=plan_eval, run=_run)


def _run(plan: EvalPlan, words: list[str], show_traceback: bool) -> int:
    from online_dpo.cli.evaluation.report import run_evaluation

    return run_evaluation(plan, show_traceback=show_traceback)
