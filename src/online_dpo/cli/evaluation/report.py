"""``online-dpo eval`` after its arguments have been checked: sample answers, score them, print and write a report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from online_dpo.cli.evaluation.plan import EvalPlan
from online_dpo.cli.terminal.errors import report_error
from online_dpo.cli.terminal.progress import no_progress_bars, plain_warnings
from online_dpo.cli.train import load_judge, load_reward, load_tokenizer
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.load import load_prompts
from online_dpo.data.prompts import PREPARED_COLUMNS
from online_dpo.distributed.signals import is_interruption
from online_dpo.errors import ScoringError, printable
from online_dpo.evaluation.comparison import PromptResult, compare
from online_dpo.evaluation.conclusions import comparison_conclusion
from online_dpo.evaluation.head_to_head import (
    Answers,
    ComparedModel,
    Sampling,
    answer,
    judge_answers,
    prepare_model,
    same_vocabulary,
    score_answers,
    unscored_results,
)
from online_dpo.scoring.judge_registry import build_judge
from online_dpo.scoring.penalties import Penalties
from online_dpo.scoring.protocols import DiagnosingScorer, PairwiseScorer, PointwiseScorer
from online_dpo.scoring.registry import build_scorers
from online_dpo.training.arguments import check_columns, check_templates
from online_dpo.training.display.figures import number
from online_dpo.types import Completion, Group

TRAINED_ON = (
    "The scorer is the one that the model was trained on. Training also exploits its weaknesses: give another scorer "
    "with --reward or --judge."
)

ESCAPED = "backslashreplace"
"""Half a surrogate pair, which UTF-8 does not have, becomes what JSON writes for it."""


@dataclass(frozen=True)
class Setup:
    """Everything that an evaluation needs except the weights of the two models, which are loaded one at a time."""

    args: OnlineDPOConfig
    scorers: list[PointwiseScorer]
    judge: PairwiseScorer | None
    model: ComparedModel
    against: ComparedModel
    sampling: Sampling

    @property
    def scored_by(self) -> str:
        """The name of the judge, or of all scorers."""
        return self.judge.name if self.judge is not None else ", ".join(scorer.name for scorer in self.scorers)


@no_progress_bars()
@plain_warnings()
def run_evaluation(plan: EvalPlan, *, show_traceback: bool) -> int:
    """Run a checked plan and return the exit code: 0, 1 (scoring failed) or 2 (something cannot be loaded)."""
    try:
        setup = set_up(plan)
        answers = answer(setup.model, setup.against, setup.args, setup.sampling)
        # Written before scoring, which may fail: sampling the answers took long.
        _write(plan.options.output, map(_line, _rows(unscored_results(answers))))
    except BaseException as error:  # libraries have their own for a file or a hub that they cannot use
        if is_interruption(error):
            raise
        return report_error(error, 2, show_traceback)
    try:
        results = _assess(setup, answers)
        figures = {**_heading(plan, setup), **compare(results, setup.args.seed)}
        if figures["undecidable"] == figures["duels"]:
            raise ScoringError(_no_preference_message(setup))
    except BaseException as error:
        if is_interruption(error):
            raise
        report_error(error, 1, show_traceback)
        if plan.options.output is not None:
            print(f"The answers, without scores, are in {plan.options.output}", file=sys.stderr)
        return 1
    report(Console(), figures)
    if plan.trained_on:
        print(f"warning: {TRAINED_ON}", file=sys.stderr)
    return _write_results(plan, figures, results, show_traceback)


def _write_results(
    plan: EvalPlan, figures: dict[str, Any], results: Sequence[PromptResult], show_traceback: bool
) -> int:
    """Write the files that were asked for, each of them also where another one cannot be written."""
    code = 0
    for what, path, lines in (
        ("Figures", plan.options.json, [json.dumps(figures, indent=2)]),
        ("Answers", plan.options.output, map(_line, _rows(results))),
    ):
        try:
            if _write(path, lines):
                print(f"{what} written to {path}")
        except OSError as error:
            code = report_error(OSError(f"{what} could not be written to {path}: {error.strerror}"), 1, show_traceback)
    return code


def set_up(plan: EvalPlan) -> Setup:
    """Load the scorers or the judge and prepare the prompts for both models.

    Raises:
        ValueError, TypeError, OSError, ImportError, OnlineDPOError: something cannot be used as asked; raised before
            the models are loaded.
    """
    plan.plugins.load()
    rewards = [reward if isinstance(reward, str) else load_reward(reward) for reward in plan.rewards]
    args = OnlineDPOConfig(**{**plan.training, "report_to": [], "disable_tqdm": True})
    tokenizers = [load_tokenizer(path, args) for path in (plan.model, plan.against)]
    shared = same_vocabulary(*tokenizers)
    if plan.options.kl and not shared:
        raise ValueError(
            f"`kl`: {plan.model} and {plan.against} have different vocabularies, so there is no KL between them. Leave "
            "`kl` out."
        )
    source = plan.prompts
    dataset = load_prompts(
        source.source, split=source.split, config=source.config, limit=source.limit, types=source.types
    )
    model, against = (
        prepare_model(path, tokenizer, dataset, args)
        for path, tokenizer in zip((plan.model, plan.against), tokenizers, strict=True)
    )
    check_columns(rewards, {"prompts": model.dataset}, PREPARED_COLUMNS)
    wants_kl = shared if plan.options.kl is None else plan.options.kl
    judge = None if plan.judge is None else load_judge(plan.judge, args)
    scorers = [] if judge is not None else build_scorers(rewards, None, args, state=None)
    check_templates(scorers, model.dataset)
    return Setup(
        args=args,
        scorers=scorers,
        judge=None if judge is None else build_judge(judge, tokenizers[0], args),
        model=model,
        against=against,
        sampling=Sampling(plan.options.samples, plan.options.greedy, wants_kl),
    )


def report(console: Console, figures: dict[str, Any]) -> None:
    """Print the figures of `compare` as a table and a few lines."""
    title = Text(printable(f"{figures['prompts']} prompts, scored by {figures['scored_by']}"))  # no mark-up of rich
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for side in ("model", "against"):
        table.add_column(Text(printable(figures[side])), justify="right", overflow="fold")
    if figures["score"] is not None:
        sides = [figures["score"][side] for side in ("model", "against")]
        table.add_row("score", *(_with_interval(side) for side in sides))
        table.add_row("scores missing", *(str(side["missing"]) for side in sides))
    for heading, name in (("tokens", "tokens"), ("characters", "characters"), ("ended by themselves", "ended")):
        show = _percent if name == "ended" else number
        table.add_row(heading, *(show(figures[name][side]) for side in ("model", "against")))
    console.print(table)
    for line in _lines(figures):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    yield (
        f"Wins {figures['wins']}, ties {figures['ties']}, losses {figures['losses']}"
        + (f", undecidable {figures['undecidable']}" if figures["undecidable"] else "")
        + f" of {figures['duels']}"
    )
    rate = figures["win_rate"]
    yield f"Win rate {_percent_with_interval(rate)} ({rate['interval']})"
    controlled = figures["length_controlled_win_rate"]
    if controlled is None:
        yield "Length-controlled win rate: none, the lengths always differ by the same amount"
    else:
        yield f"Length-controlled win rate {_percent_with_interval(controlled)} ({controlled['interval']})"
    if figures["score"] is not None and figures["score"]["difference"]["value"] is not None:
        yield f"Score difference {_with_interval(figures['score']['difference'])} (bootstrap, paired)"
    if figures["kl"] is not None:
        error = figures["kl"]["standard_error"]
        yield f"KL {number(figures['kl']['value'])} nats" + (
            "" if error is None else f", standard error {number(error)}"
        )
    yield comparison_conclusion(figures["model"], figures["against"], figures["prompts"], rate, controlled)


def _assess(setup: Setup, answers: Answers) -> list[PromptResult]:
    """Score the answers, or compare them with the judge."""
    penalties = Penalties.from_config(setup.args)
    if setup.judge is not None:
        return judge_answers(answers, setup.judge, penalties)
    return score_answers(answers, setup.scorers, setup.args.reward_weights, penalties)


def _heading(plan: EvalPlan, setup: Setup) -> dict[str, Any]:
    args, options = setup.args, plan.options
    return {
        "model": plan.model,
        "against": plan.against,
        "prompts_from": plan.prompts.source,
        "scored_by": setup.scored_by,
        "trained_on_scorer": plan.trained_on,
        "samples": options.samples,
        "greedy": options.greedy,
        "temperature": None if options.greedy else args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
    }


def _no_preference_message(setup: Setup) -> str:
    failure = setup.judge.last_failure if isinstance(setup.judge, DiagnosingScorer) else ""
    cause = f" Last cause: {failure}" if failure else ""
    return (
        f"`{setup.scored_by}` could not tell a single pair of answers apart: every score or answer is missing.{cause}"
    )


def _rows(results: Sequence[PromptResult]) -> Iterator[dict[str, Any]]:
    for result in results:
        for k, preference in enumerate(result.preferences):
            yield {
                "prompt": result.model.prompt.content,
                "row": result.model.prompt.row,
                "sample": k,
                "model": _side(result.model, result.model_scores, k),
                "against": _side(result.against, result.against_scores, k),
                "preference": preference,
            }


def _side(group: Group, scores: Sequence[float | None] | None, k: int) -> dict[str, Any]:
    completion: Completion = group.completions[k]
    side = {
        "text": completion.text,
        "tokens": len(completion.token_ids),
        "ended": completion.finish_reason == "stop",
    }
    return side if scores is None else {**side, "score": scores[k]}


def _write(path: str | None, lines: Iterable[str]) -> bool:
    """Write lines to a file, if a path is given; returns whether it is.

    Raises:
        OSError: it cannot be written; the error names it, which that of a full disk does not by itself.
    """
    if path is not None:
        text = "".join(f"{line}\n" for line in lines)
        try:
            Path(os.path.expanduser(path)).write_text(text, encoding="utf-8", errors=ESCAPED)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error
    return path is not None


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _percent_with_interval(one: dict[str, Any]) -> str:
    return f"{one['value']:.1%}, 95 % interval {one['low']:.1%} to {one['high']:.1%}"


def _with_interval(one: dict[str, Any]) -> str:
    if one["value"] is None:
        return "none"
    return f"{number(one['value'])} ({number(one['low'])} to {number(one['high'])})"
