"""The page on the architecture names what there is: paths, packages, tests, and the invariants by their numbers."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/online_dpo"
TESTS = ROOT / "tests"
PAGE = (ROOT / "docs/architecture.md").read_text()
DECISIONS = sorted((ROOT / "docs/decisions").glob("*.md"))
PATH = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.py|(?:[\w.-]+/)+[\w.-]*)`")


def section(title: str) -> str:
    return re.split(r"^#+ ", PAGE.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| ?(.*?) ?\|", text, flags=re.MULTILINE)[2:]  # below the head and its line


def is_there(path: str) -> bool:
    """In the repository, in the package or below ``tests/``."""
    return any((folder / path).exists() for folder in (ROOT, SOURCE, TESTS))


@pytest.mark.parametrize("page", [ROOT / "docs/architecture.md", *DECISIONS], ids=lambda page: page.name)
def test_paths_exist(page):
    paths = set(PATH.findall(page.read_text()))
    assert paths and [path for path in sorted(paths) if not is_there(path)] == []


def test_every_package_is_in_the_map():
    packages = {f"{file.parent.relative_to(SOURCE)}/" for file in SOURCE.rglob("__init__.py")} - {"./"}
    assert {name.strip("`") for name in first_column(section("The package map"))} == packages


def test_floors_are_those_of_the_import_contract():
    drawn = section("The package map").split("```")[1].strip().splitlines()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    floors = [set(re.findall(r"\w+", line)) for line in drawn]
    assert floors == [set(re.findall(r"\w+", layer)) for layer in layers]


def test_invariants_have_the_numbers_that_tests_cite_and_each_has_a_test():
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", section("Invariants"), flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 18))
    assert all(re.search(r"`\w+/[\w/]*test_\w+\.py`", files) for _, files in rows)


def test_functions_and_classes_of_a_step_are_defined():
    named = re.findall(r"`(\w+)(?:\.\w+)?`", section("One optimizer step"))
    code = "\n".join(file.read_text() for file in SOURCE.rglob("*.py"))
    defined = set(re.findall(r"\b(?:class|def) (\w+)", code))
    fields = set(re.findall(r"^    (\w+):", code, flags=re.MULTILINE))
    assert named and set(named) - defined - fields - {"Trainer", "num_items_in_batch"} == set()


def test_every_decision_is_linked():
    assert DECISIONS and all(f"(decisions/{file.name})" in PAGE for file in DECISIONS)
