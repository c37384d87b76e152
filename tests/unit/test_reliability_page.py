"""The table of docs/project/reliability-table.md says what the tests in tests/faults assert."""

from pathlib import Path

from faults.catalogue import shorter_list
from faults.table import filled

PAGE = Path(__file__).parents[2] / "docs" / "project" / "reliability-table.md"
KINDS = {"kill", "checkpoint", "identity", "disk", "signal", "output", "numbers", "memory"} | {
    *("judge service", "judge cache", "reward function", "reward service", "run file", "data", "model folder"),
    *("security", "ranks"),
}


def test_the_page_is_current():
    page = PAGE.read_text()
    assert page == filled(page), "make pages writes it anew"


def test_there_are_faults_of_every_kind():
    faults = shorter_list()
    assert len(faults) >= 250
    assert {fault.kind for fault in faults} >= KINDS
