"""``online-dpo export``: write the pairs of run folders as a preference dataset."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from online_dpo.cli.parser import WRONG_INPUT, OneLineParser, with_hyphens
from online_dpo.cli.run_folders import check_target, run_folder
from online_dpo.cli.terminal.screen import print_lines
from online_dpo.runs.export.export import Dataset, Exported, RowsOf, export, left_out_lines, sources_of, vote_rows
from online_dpo.runs.export.files import FORMATS
from online_dpo.runs.export.rows import Selection

CALLED_HERE = {
    "output": "to",
    "out": "to",
    "output_file": "to",
    "margin": "min_margin",
    "step": "steps",
    "force": "overwrite",
    "completions": "all_completions",
}

NO_COMPLETIONS = "A run does, unless `run_folder: false` or `log_completions: off` is set."


def export_run(words: Sequence[str]) -> int:
    """Export what was asked for. Returns the exit code: 0, 1 (it cannot be written) or 2 (wrong input)."""
    arguments = _parser().parse_args(with_hyphens(list(words)))
    try:
        rows_of = _rows_of(arguments)
        _check_file(arguments.to, arguments.folders, arguments.overwrite)
        told = export(rows_of, arguments.to)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return WRONG_INPUT
    except OSError as problem:
        print(f"error: {problem.filename or arguments.to}: {problem.strerror}", file=sys.stderr)
        return 1
    print_lines([_said(told, arguments), *(f"  {line}" for line in left_out_lines(told))])
    return 0


def _said(told: Exported, arguments: argparse.Namespace) -> str:
    if arguments.votes:
        return f"{told.rows:,} votes written to {arguments.to}"
    what = "completions" if arguments.all_completions else "pairs"
    return f"{told.rows:,} {what} of {told.groups:,} groups written to {arguments.to}"


def _rows_of(arguments: argparse.Namespace) -> RowsOf:
    """The rows that the options ask for.

    Raises:
        ValueError: an option is wrong, or a folder is none of a run.
    """
    first, last = _steps(arguments.steps)
    if arguments.all_completions and arguments.min_margin is not None:
        raise ValueError("--min-margin is about pairs; it does not go with --all-completions.")
    if arguments.min_margin is not None and not math.isfinite(arguments.min_margin):
        raise ValueError(f"--min-margin must be a number; it is {arguments.min_margin}.")
    if arguments.votes and (arguments.all_completions or arguments.min_margin is not None or arguments.steps):
        raise ValueError("--votes are people's, of all steps: it goes with no other choice of rows.")
    folders = list(dict.fromkeys(map(run_folder, arguments.folders)))
    selection = Selection(first, last, arguments.min_margin)
    make_rows = selection.completion_rows if arguments.all_completions else selection.pair_rows
    sources = sources_of(folders)
    if arguments.votes:
        return partial(vote_rows, sources)
    for source in sources:
        if not source.by_rank:
            raise ValueError(f"{source.folder.path}: the run has written no completions. {NO_COMPLETIONS}")
    return Dataset(sources, make_rows, selection.has_step).rows


def _steps(text: str | None) -> tuple[int, int | None]:
    """The first and the last step of ``A:B``.

    Raises:
        ValueError: it is something else.
    """
    if text is None:
        return 0, None
    parts = text.split(":")
    if len(parts) > 2 or not any(parts) or not all(part.isdecimal() or not part for part in parts):
        raise ValueError(f"--steps is {text!r}; wanted: such as 100:200, 100:, :200 or 100.")
    first = int(parts[0] or 0)
    last = first if len(parts) == 1 else int(parts[1]) if parts[1] else None
    if last is not None and last < first:
        raise ValueError(f"--steps is {text!r}: the last step is before the first.")
    return first, last


def _check_file(to: Path, folders: Sequence[Path], overwrite: bool) -> None:
    if to.suffix not in FORMATS:
        raise ValueError(f"--to: {to} has another ending than {' or '.join(FORMATS)}, which says what to write.")
    check_target("--to", to, folders)
    if to.exists() and not overwrite:
        raise ValueError(f"--to: {to} exists. Give another name, or --overwrite.")


def _parser() -> OneLineParser:
    parser = OneLineParser(
        called_here=CALLED_HERE,
        prog="online-dpo export",
        description="Write the pairs that a run was trained on as a preference dataset, as TRL's DPOTrainer and "
        "RewardTrainer take it: prompt, chosen, rejected, and their scores.",
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="output folder of a run")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help="file to write: its name ends in .jsonl or .parquet"
    )
    parser.add_argument("--steps", metavar="A:B", help="only the steps from A to B, both included")
    parser.add_argument("--min-margin", type=float, metavar="X", help="only pairs whose scores differ by at least X")
    parser.add_argument(
        "--all-completions", action="store_true", help="a row for each completion with its scores, not for each pair"
    )
    parser.add_argument(
        "--votes", action="store_true", help="people's votes instead, in the form that `online-dpo judge` reads"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser
