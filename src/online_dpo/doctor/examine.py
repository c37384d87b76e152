"""Runs the checks, one after the other. An error of one is a finding, and the next one runs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from online_dpo.distributed.signals import is_interruption
from online_dpo.doctor.case import Case, NotThere
from online_dpo.doctor.checks import ORDER
from online_dpo.doctor.findings import Finding
from online_dpo.doctor.registry import CHECKS, LOADS_MODELS
from online_dpo.errors import OnlineDPOError, error_text, named_error

EXPLAINED = (ValueError, TypeError, OSError, ImportError, OnlineDPOError)
"""Errors whose message says what to do without the name of their type."""

for file in ORDER:  # each registers what it has, before plugins do
    import_module(f"online_dpo.doctor.checks.{file}")


def examine(case: Case) -> Iterator[Finding]:
    """Yields what all checks find, and warnings that were given meanwhile."""
    left_out = CHECKS.having(LOADS_MODELS) if case.subject.quick else []
    for name in CHECKS:
        if name in left_out:
            yield Finding("skipped", "left out: --quick loads no models", check=name)
        else:
            yield from _run(name, case)
    for note in dict.fromkeys(case.notes):
        found, _, change = note.partition(". ")
        yield Finding("warning", found, change, check="warnings")


def _run(name: str, case: Case) -> Iterator[Finding]:
    try:
        for finding in CHECKS[name](case):
            yield named(finding, name)
    except NotThere as why:
        yield Finding("skipped", f"not looked at: {why}", check=name)
    except BaseException as error:  # the report goes on, whatever the user's own code raises
        if is_interruption(error):
            raise
        yield failure(error, name)


def named(finding: Finding, name: str) -> Finding:
    """Returns a finding with the name of its check."""
    return Finding(finding.mark, finding.found, finding.change, finding.lines, finding.facts, name)


def failure(error: BaseException, name: str) -> Finding:
    """Returns the problem that an error is, with the words in which a run would report it."""
    text = error_text(error) if isinstance(error, EXPLAINED) else named_error(error)
    return Finding("problem", text, check=name)
