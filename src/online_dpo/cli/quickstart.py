"""``online-dpo quickstart``: train a tiny model on embedded data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from online_dpo.cli.parser import OneLineParser, with_hyphens
from online_dpo.cli.runfile.planning import print_version_warning


def quickstart(words: Sequence[str]) -> int:
    """Run the embedded example, which prints its results. Returns the exit code: 0, or 2 (wrong input)."""
    arguments = _parser().parse_args(with_hyphens(list(words)))
    output_dir: Path = arguments.output_dir
    if output_dir.exists() and not output_dir.is_dir():
        print(f"error: --output-dir {output_dir} is a file. Give the name of a folder.", file=sys.stderr)
        return 2
    print_version_warning()
    print("Loading torch and transformers")
    from online_dpo.cli.terminal.progress import ProgressDisplay, no_progress_bars
    from online_dpo.quickstart.run import run_quickstart

    with no_progress_bars():
        run_quickstart(output_dir, arguments.seed, callbacks=[ProgressDisplay()])
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        called_here={"output": "output_dir", "out": "output_dir", "random_seed": "seed"},
        prog="online-dpo quickstart",
        description="Train a tiny model on embedded data, offline, on any computer.",
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/quickstart"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    return parser
