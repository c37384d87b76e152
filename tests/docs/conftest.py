from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from docs.blocks import names_on_the_hub
from docs.runner import Stage, hub_variables, warmed, write_commands
from support.endpoint import Answer, says, serving


def judge(body: dict[str, Any], number: int) -> Answer:
    """Answers as a judge does, now for one and now for the other."""
    first = number % 3 != 0
    asked = 0.9 if first else 0.2
    return says("A" if first else "B", p_first=asked if body.get("logprobs") else None)


def scores(body: dict[str, Any], number: int) -> Answer:
    """Scores as a service of rewards gives them: by the length."""
    return Answer({"scores": [float(len(text)) for text in body["completions"]]})


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root: Path = tmp_path_factory.mktemp("docs")
    with ExitStack() as stack:
        warm = stack.enter_context(warmed(root, names_on_the_hub()))
        addresses = {
            "http://localhost:8000/v1": stack.enter_context(serving(judge)).url,
            "http://localhost:9000/score": stack.enter_context(serving(scores, path="/score")).url,
        }
        yield Stage(root / "ground", warm, write_commands(root / "bin"), addresses, hub_variables(root / "hub"))
