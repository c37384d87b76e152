"""All faults: those of every `cases_<kind>.py` in this folder."""

from __future__ import annotations

from collections import defaultdict
from importlib import import_module
from pathlib import Path

from faults.harness import Fault

MOST_OF_A_KIND = 7


def all_faults() -> dict[str, Fault]:
    """Faults by their ids, which differ."""
    found: dict[str, Fault] = {}
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        for fault in import_module(f"faults.{path.stem}").FAULTS:
            assert fault.id not in found, f"two faults are called {fault.id}"
            found[fault.id] = fault
    return found


def shorter_list() -> list[Fault]:
    """The faults that CI tries: those that are quick, and of each kind at most `MOST_OF_A_KIND`, evenly spread."""
    by_kind: defaultdict[str, list[Fault]] = defaultdict(list)
    for fault in all_faults().values():
        if fault.quick:
            by_kind[fault.kind].append(fault)
    kept = {fault.id for faults in by_kind.values() for fault in _spread(faults)}
    return [fault for fault in all_faults().values() if fault.id in kept]


def _spread(faults: list[Fault]) -> list[Fault]:
    number = min(len(faults), MOST_OF_A_KIND)
    return [faults[place * len(faults) // number] for place in range(number)]
