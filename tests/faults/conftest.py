from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.ground import make_ground
from faults.runs import Stage


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", action="store_true", help="the longer list of faults as well")


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("runs"), make_ground(tmp_path_factory.mktemp("ground")))
    yield made
    made.close()
