"""Files and folders: what is read is there, and `output_dir` can take the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from online_dpo.config.requirements import TRACKERS
from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, ok, problem
from online_dpo.doctor.registry import check
from online_dpo.scoring.registry import check_reward_columns, check_scorers
from online_dpo.training.run_identity import check_options

OTHERS = ("prompt_ids", "prompt_row", "prompt_invalid", "prompt_cut")
"""Columns of a prepared dataset that no function gets."""


@check("files")
def files(case: Case) -> Iterator[Finding]:
    """Models, prompts and functions that the run reads, and the folder that it writes."""
    args, subject = case.args, case.subject
    config = case.config
    rows = case.rows
    subject.eval_dataset()
    rewards, gold = case.rewards
    columns = rows.column_names or []
    for functions in (rewards, gold):
        if functions:
            known = ["prompt", *columns]
            check_reward_columns(functions, [name for name in known if name not in OTHERS], "the dataset")
    if rewards:
        check_scorers(rewards, None, args)
    check_options(subject.settings.get("resume_from_checkpoint"), args)
    yield from _trackers(args.report_to)
    size = f"{len(rows)} rows" if isinstance(rows, Dataset) else "a stream"
    yield ok(
        f"model {subject.model} ({config.model_type}); {size} with the columns {', '.join(columns)}; "
        f"{len(rewards)} reward(s); {_folder(Path(str(args.output_dir)))}"
    )


def _folder(path: Path) -> str:
    return f"{path} is there" if path.is_dir() else f"{os.fspath(path)} will be made"


def _trackers(names: str | list[str] | None) -> Iterator[Finding]:
    """Says what is missing for the trackers that the run reports to."""
    for name in [names] if isinstance(names, str) else names or []:
        if name in TRACKERS and TRACKERS[name].missing:
            yield problem(f"`report_to` names {name}, which is not installed", TRACKERS[name].install)
