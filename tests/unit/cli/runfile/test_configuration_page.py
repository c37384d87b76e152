"""The page with all fields: what a row holds, and that the page in the repository is current."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from online_dpo.cli.runfile.configuration_page import configuration_page
from online_dpo.cli.runfile.help import GROUPS
from online_dpo.cli.runfile.ray_section import NAME as RAY_SETTINGS
from online_dpo.cli.runfile.schema import PARENT, FieldSpec, load_fields, read_fields_of

PAGE = Path(__file__).parents[4] / "docs" / "reference" / "configuration.md"


def test_the_page_in_the_repository_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == configuration_page(load_fields()), "run `make pages`"


def test_a_field_is_a_row_of_its_group() -> None:
    choices = ("a", "b")
    fields = {
        "one": FieldSpec("one", "str | None", "'a'", "Either `a`\nor b|c.", group="", choices=choices, section="loss"),
        "two": FieldSpec("two", "int", None, "", group="Run", required=True, section="guards"),
        "three": FieldSpec("three", "int", "3", "Elsewhere.", group=PARENT),
    }
    page = configuration_page(fields)
    below = {part.split("\n")[0]: part for part in page.split("\n## ")}
    assert r"| `one` | `str \| None` | `'a'` | `a`, `b` | Either `a` or b\|c. |" in below["loss"]
    assert "| `two`* | `int` | required |  |  |" in below["guards"]
    assert [heading for heading in below if heading in GROUPS] == list(GROUPS) and "`three`" not in page


def test_every_field_of_ours_is_there_once_and_has_five_cells() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    names = [row.split("`")[1] for row in rows]
    settings = [f"ray.{name}" for name in read_fields_of(*RAY_SETTINGS)]
    assert sorted(names) == sorted([name for name, spec in load_fields().items() if spec.group != PARENT] + settings)
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {7}


def test_the_command_needs_no_torch() -> None:
    code = (
        "import runpy, sys; runpy.run_module('online_dpo.cli.runfile.configuration_page', run_name='__main__')\n"
        "assert not {'torch', 'transformers', 'datasets', 'accelerate'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, PAGE.read_text(encoding="utf-8"), "")
