"""``online-dpo quickstart``."""

from __future__ import annotations

import sys
from pathlib import Path

from online_dpo.cli.runfile.planning import say_untested_versions


def quickstart(output_dir: Path, seed: int) -> int:
    """Run the embedded example, which prints what it found. Returns the exit code."""
    if output_dir.exists() and not output_dir.is_dir():
        print(f"error: --output-dir {output_dir} is a file. Give the name of a folder.", file=sys.stderr)
        return 2
    say_untested_versions()
    print("Loading torch and transformers")
    from online_dpo.cli.terminal.progress import ProgressDisplay, no_progress_bars
    from online_dpo.quickstart.run import run_quickstart

    with no_progress_bars():
        run_quickstart(output_dir, seed, callbacks=[ProgressDisplay()])
    return 0
