"""Paths that a run must not read or write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from online_dpo.cli.runfile.paths import exists, output_problem, path_problem, same_file


@pytest.mark.parametrize("text", ["owner/model", "data/[1].jsonl", "with space.jsonl", "~/x", "ünï", "x" * 255])
def test_paths_that_are_fine(text: str) -> None:
    assert path_problem(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "": "is empty.",
        " \t": "is empty.",
        "data.jsonl ": "is 'data.jsonl ': there is white space at an end",
        "\nmodel": "is '\\nmodel': there is white space",
        "a\nb": "is 'a\\nb': there is white space at an end, or a line break in it.",
        "x" * 256: "256 bytes are too long for a file system.",
        "é" * 128: "256 bytes are too long for a file system.",
        "a/" * 2100: "4200 bytes are too long",
    }.items(),
)
def test_texts_that_are_no_paths(text: str, message: str) -> None:
    assert message in (path_problem(text) or "")


def test_folders_that_must_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("x")
    os.symlink("model", tmp_path / "link")
    inputs = [("model_name_or_path", "model"), ("dataset_name", "owner/data"), ("ref_model_name_or_path", "x" * 5000)]
    expected = {
        "out": None,
        "model/run": None,
        ".": None,
        "model": "is the folder of `model_name_or_path`, whose files the run would replace. Give another one.",
        "./model/": "is the folder of `model_name_or_path`",
        str(tmp_path / "model"): "is the folder of `model_name_or_path`",
        "link": "is the folder of `model_name_or_path`",
        "file": "is a file. Give the name of a folder, new or old.",
        "/dev/null": "is a file.",
        "file/run": "cannot be made: ",
        "/": "is the root of the file system.",
        "../../../../../../../../..": "is the root of the file system.",
        "": "is empty. Give the name of a folder, new or old.",
        "out ": "is 'out ': there is white space at an end",
        "$HOME/out": "is '$HOME/out': environment variables are not filled in here.",
    }
    found = {text: output_problem(text, inputs) for text in expected}
    assert {text: (problem or "").startswith(expected[text] or "") for text, problem in found.items()} == dict.fromkeys(
        expected, True
    )
    assert [text for text, problem in found.items() if problem is None] == ["out", "model/run", "."]


def test_a_folder_in_which_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert output_problem(str(tmp_path / "a" / "b"), []) == f"cannot be written: nothing may be written in {tmp_path}."


def test_a_name_with_the_signs_of_a_pattern_is_found(tmp_path: Path) -> None:
    for name in ("data[1].jsonl", "a*b.csv", "q?.jsonl"):
        (tmp_path / name).write_text("x")
        assert exists(tmp_path / name)
    assert exists(tmp_path / "*.csv") and not exists(tmp_path / "data[2].jsonl")


def test_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    os.symlink("a", tmp_path / "c")
    assert same_file(tmp_path / "a", tmp_path / "c")
    assert not same_file(tmp_path / "a", tmp_path / "b") and not same_file(tmp_path / "a", tmp_path / "d")
