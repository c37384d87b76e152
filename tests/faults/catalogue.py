"""All faults: those of every `cases_<kind>.py` in this folder."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from faults.harness import Fault


def all_faults() -> dict[str, Fault]:
    """Faults by their ids, which differ."""
    found: dict[str, Fault] = {}
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        for fault in import_module(f"faults.{path.stem}").FAULTS:
            assert fault.id not in found, f"two faults are called {fault.id}"
            found[fault.id] = fault
    return found
