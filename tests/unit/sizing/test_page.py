"""The tables of docs/guides/several-gpus.md are those of the formula."""

import subprocess
import sys
from pathlib import Path

from online_dpo.sizing.needs import memory_needs
from online_dpo.sizing.page import GPUS, MODES, training_table, with_tables
from online_dpo.sizing.plan import Plan
from online_dpo.sizing.shape import MODELS

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "several-gpus.md"


def test_the_page_is_current():
    page = PAGE.read_text()
    assert page == with_tables(page), "make pages writes it anew"


def test_a_cell_is_what_the_formula_says():
    rows = training_table().splitlines()[2:]
    assert len(rows) == len(MODELS) * len(MODES)
    [row] = [row for row in rows if row.startswith("| 7B | all weights, FSDP2 |")]
    needs = [memory_needs(Plan(MODELS["7B"], "fsdp2", gpus=gpus, engine="servers")).gpu / 2**30 for gpus in GPUS[1:]]
    assert row.split(" | ")[2:] == ["", f"{needs[0]:.0f}", f"{needs[1]:.0f} |"]


def test_the_formula_loads_neither_torch_nor_transformers():
    code = "import sys, online_dpo.sizing.page; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
