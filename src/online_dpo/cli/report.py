"""``online-dpo report``: make a page of a run folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from online_dpo.checkpoints.files import write_text
from online_dpo.cli.parser import WRONG_INPUT, OneLineParser, with_hyphens
from online_dpo.cli.run_folders import check_target, run_folder
from online_dpo.cli.terminal.screen import print_lines
from online_dpo.runs.layout import REPORT
from online_dpo.runs.report.facts import facts_of
from online_dpo.runs.report.page import is_report, render


def report_run(words: Sequence[str]) -> int:
    """Make the page. Returns the exit code: 0, 1 (it cannot be written) or 2 (wrong input)."""
    arguments = _parser().parse_args(with_hyphens(list(words)))
    try:
        folder = run_folder(arguments.folder)
        output = arguments.output or folder / REPORT
        check_target("--output", output, [folder])
        if output.exists() and not is_report(output):
            raise ValueError(f"{output} exists and is no report. Give another file with --output.")
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return WRONG_INPUT
    try:
        facts = facts_of(folder)
        write_text(output, render(facts))
    except OSError as problem:
        print(f"error: {problem.filename or output}: {problem.strerror}", file=sys.stderr)
        return 1
    print_lines([f"Report written to {output}", *(f"  {line}" for line in facts.missing)])
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        called_here={"to": "output", "out": "output", "output_file": "output", "file": "output"},
        prog="online-dpo report",
        description="Make one page of what a run was, what came of it, and what was skipped and why.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="output folder of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: FOLDER/report.html)")
    return parser
