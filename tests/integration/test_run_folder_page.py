"""The examples of docs/reference/run-folder read a real run folder."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from online_dpo.runs.events import Kind
from online_dpo.runs.reading import RunFolder
from support import training

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "run-folder.md").read_text()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    training.trainer(folder / "out", run_folder=True, max_steps=2).train()
    return folder


def example(name):
    [code] = re.findall(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", PAGE, flags=re.DOTALL)
    return code


def test_the_example_in_python_prints_the_pairs(out):
    done = subprocess.run([sys.executable, "-c", example("python")], cwd=out, capture_output=True, text=True)
    run = RunFolder(out / "out")
    pairs = [pair for at in run.all_frames() for group in run.groups(at) for pair in group.get("pairs", [])]
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(pairs) > 0


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_the_example_in_a_shell_prints_a_group(out):
    done = subprocess.run(["bash", "-c", example("shell")], cwd=out, capture_output=True, text=True)
    assert done.stdout.startswith('{"step":1,"rank":0,"index":0'), done.stderr


def test_the_example_for_duckdb_counts_groups(out, monkeypatch):
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.chdir(out)
    assert [row[:2] for row in duckdb.sql(example("duckdb")).fetchall()] == [(1, 4), (2, 4)]


def test_every_kind_of_event_is_in_the_table():
    for kind in Kind.__args__:
        assert f"`{kind}`" in PAGE, kind
