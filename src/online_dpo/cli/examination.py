"""``online-dpo doctor`` after its words have been read: hand the run to the checks, and print what they find."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from online_dpo.cli.judging.plan import BuiltInJudge
from online_dpo.cli.runfile.run_file import RunPlan
from online_dpo.cli.terminal.progress import no_progress_bars
from online_dpo.cli.terminal.screen import print_lines
from online_dpo.cli.train import (
    eval_dataset_of,
    load_judge,
    load_rewards,
    load_tokenizer,
    peft_config_of,
    train_dataset_of,
)
from online_dpo.distributed.settings import kept_settings
from online_dpo.doctor.case import Case, Subject
from online_dpo.doctor.examine import examine, failure
from online_dpo.doctor.findings import Finding

GIVEN_AS_OBJECTS = ("reward_model_path", "eval_reward_model_path")
INDENT = 22


def report(name: str, plan: RunPlan | None, problems: Sequence[str], options: argparse.Namespace) -> int:
    """Examine the run, print what was found, and return the exit code."""
    out, findings = sys.stdout, []
    show = (lambda finding: None) if options.json else lambda finding: _print(finding, out)
    with (
        no_progress_bars(),
        redirect_stdout(sys.stderr),  # what libraries and the run's own code print is no part of the report
        TemporaryDirectory(prefix="online-dpo-doctor-") as scratch,
    ):
        for finding in _findings(plan, problems, Path(scratch), options):
            findings.append(finding)
            show(finding)
    counts = Counter(finding.mark for finding in findings)
    if options.json:
        facts = {"run_file": name, "problems": counts["problem"], "warnings": counts["warning"]}
        print(json.dumps({**facts, "findings": [asdict(one) for one in findings]}, indent=2, default=str))
    else:
        print(f"\n{_counted(counts['problem'], 'problem')}, {_counted(counts['warning'], 'warning')}.")
    return 1 if counts["problem"] else 0


def _findings(
    plan: RunPlan | None, problems: Sequence[str], scratch: Path, options: argparse.Namespace
) -> Iterator[Finding]:
    for line in problems:
        yield Finding("problem", line, check="run file")
    if plan is None:
        yield Finding("skipped", "no other check was made: mend the run file first", check="run file")
        return
    for line in plan.warnings:
        yield Finding("warning", line, check="run file")
    try:
        with kept_settings("Importing the run's own code"):
            plan.plugins.load()
    except Exception as error:  # the user's own code may raise anything
        yield failure(error, "run file")
        return
    if not plan.warnings:
        yield Finding("ok", "all fields are known and go together", check="run file")
    yield from examine(Case(_subject(plan, options), scratch))


def _subject(plan: RunPlan, options: argparse.Namespace) -> Subject:
    run, training = plan.run, plan.training
    judge = plan.judge

    def loader(given: Any) -> Callable[[Any], Any]:
        if isinstance(given, BuiltInJudge) and _settings_over_http(given) is not None:
            given = replace(given, options={**given.options, "cache": None})  # nothing is written here
        return lambda args: None if given is None else load_judge(given, args)

    return Subject(
        model=run.model_name_or_path,
        ref_model=run.ref_model_name_or_path,
        settings={name: value for name, value in training.items() if name not in GIVEN_AS_OBJECTS},
        tokenizer=lambda args: load_tokenizer(run.model_name_or_path, args),
        train_dataset=lambda: train_dataset_of(run),
        eval_dataset=lambda: eval_dataset_of(run),
        rewards=lambda: load_rewards(plan.reward_funcs, training.get("reward_model_path")),
        gold=lambda: load_rewards(plan.eval_reward_funcs, training.get("eval_reward_model_path")),
        judge=loader(judge),
        eval_judge=loader(plan.eval_judge),
        peft_config=lambda: peft_config_of(run),
        reward_model=training.get("reward_model_path"),
        llm_judge=_settings_over_http(judge),
        llm_eval_judge=_settings_over_http(plan.eval_judge),
        asks_people=isinstance(judge, BuiltInJudge) and judge.human,
        has_rewards=bool(plan.reward_funcs or training.get("reward_model_path")),
        processes=options.processes,
        sharding=plan.sharding,
        ray_address=plan.ray.address,
        lora_rank=run.lora_r if run.use_peft else 0,
        quantized=bool(run.load_in_4bit),
        double_quantization=bool(run.use_bnb_nested_quant),
        quick=options.quick,
    )


def _settings_over_http(judge: Any) -> Mapping[str, Any] | None:
    """The settings of a judge that is asked over HTTP; ``None`` for every other."""
    is_one = isinstance(judge, BuiltInJudge) and judge.folder is None and not judge.human
    return judge.options if is_one else None


def _print(finding: Finding, out: TextIO) -> None:
    lines = [f"{finding.mark:<9}{finding.check:<12} {finding.found}"]
    lines += [f"{'':<{INDENT}}-> {finding.change}"] if finding.change else []
    print_lines([*lines, *(f"{'':<{INDENT}}{line}" for line in finding.lines)], INDENT, out)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"
