"""Every fault of the catalogue, in a real run (see `harness.py`)."""

from __future__ import annotations

import re

import pytest

from faults.catalogue import all_faults, shorter_list
from faults.checks import check
from faults.harness import Fault
from faults.runs import Stage


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--every", default=False)
    faults = list(all_faults().values()) if every else shorter_list()
    metafunc.parametrize("fault", faults, ids=[fault.id for fault in faults])


def test_fault(fault: Fault, stage: Stage) -> None:
    check(stage, fault, re.sub(r"[^\w.-]+", "-", fault.id))
