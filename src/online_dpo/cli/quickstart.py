"""``online-dpo quickstart``."""

from __future__ import annotations

import sys
from pathlib import Path


def quickstart(output_dir: Path, seed: int) -> int:
    """Run the embedded example and print what it found. Returns the exit code."""
    if output_dir.exists() and not output_dir.is_dir():
        print(f"error: --output-dir {output_dir} is a file.", file=sys.stderr)
        return 2
    from online_dpo.quickstart.run import run_quickstart

    for name, value in run_quickstart(output_dir=output_dir, seed=seed).items():
        print(f"{name}: {value}")
    return 0
