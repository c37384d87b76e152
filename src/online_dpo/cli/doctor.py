"""``online-dpo doctor``: look at a run before it costs anything. This module reads the words and plans the run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from online_dpo.cli.parser import WRONG_INPUT, OneLineParser, with_hyphens
from online_dpo.cli.runfile.entries import UsageError, read_run_file
from online_dpo.cli.runfile.planning import split_words
from online_dpo.cli.runfile.run_file import RunPlan, plan_run
from online_dpo.distributed.process_state import environment

EPILOG = """\
Fields after the run file win over it, as with `online-dpo train`. Nothing is written into output_dir.
Exit code: 0 no problem (there may be warnings); 1 problems; 2 the run file cannot be read.
"""


def doctor(words: Sequence[str]) -> int:
    """Examine a run and report. Returns the exit code: 0, 1 (there are problems) or 2 (no run file to read)."""
    options, rest = _parser().parse_known_args(_own_words(words))
    try:
        run_file, fields = split_words(rest)
        if run_file is None:
            raise UsageError(["command line: give a run file: online-dpo doctor run.yaml"])
        read_run_file(run_file, [])
    except UsageError as error:
        for line in error.problems:
            print(f"error: {line}", file=sys.stderr)
        return WRONG_INPUT
    plan: RunPlan | None = None
    problems: Sequence[str] = ()
    with environment(**_launched(options.processes)):
        try:
            plan = plan_run(run_file, fields)
        except UsageError as error:
            problems = error.problems
    if not options.json:
        print(f"Looking at {run_file}", file=sys.stderr)
    with redirect_stdout(sys.stderr):  # DeepSpeed writes a line when it is imported
        from online_dpo.cli.examination import report
    return report(str(run_file), plan, problems, options)


def _own_words(words: Sequence[str]) -> list[str]:
    """The words, with underscores in the names of the options of this command alone."""
    own = ("--quick", "--json", "--processes")
    return [hyphenated if (hyphenated := with_hyphens([word])[0]).partition("=")[0] in own else word for word in words]


def _launched(processes: int) -> dict[str, str]:
    """The variables of a launcher, with which the run is planned for several processes."""
    return {} if processes == 1 else {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}


def _processes(text: str) -> int:
    """The number of processes of a word.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of processes is wanted, 1 or more; it is {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="online-dpo doctor",
        usage="online-dpo doctor run.yaml [--field value ...] [--quick] [--json] [--processes N]",
        description="Look at a run before it costs anything: each check says what was found and what to change.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="leave out what loads models")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--processes", type=_processes, default=1, metavar="N", help="processes that will train (default: 1)"
    )
    return parser
