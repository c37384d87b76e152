"""The page on the architecture names what there is: paths, packages, tests, and the invariants by their numbers."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/online_dpo"
TESTS = ROOT / "tests"
PAGE = (ROOT / "docs/project/architecture.md").read_text()
DECISIONS = sorted((ROOT / "docs/project/decisions").glob("*.md"))
PATH = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.py|(?:[\w.-]+/)+[\w.-]*)`")


def section(title: str, page: str = PAGE) -> str:
    return re.split(r"^#+ ", page.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| ?(.*?) ?\|", text, flags=re.MULTILINE)[2:]  # below the head and its line


def is_there(path: str) -> bool:
    """In the repository, in the package or below ``tests/``."""
    return any((folder / path).exists() for folder in (ROOT, SOURCE, TESTS))


PAGES = [
    ROOT / "docs/project/architecture.md",
    ROOT / "docs/project/extending.md",
    ROOT / "CONTRIBUTING.md",
    *DECISIONS,
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    paths = set(PATH.findall(page.read_text()))
    assert paths and [path for path in sorted(paths) if not is_there(path)] == []


def test_every_package_is_in_the_map():
    packages = {f"{file.parent.relative_to(SOURCE)}/" for file in SOURCE.rglob("__init__.py")} - {"./"}
    assert {name.strip("`") for name in first_column(section("The package map"))} == packages


def test_floors_are_those_of_the_import_contract():
    drawn = section("The package map").split("```")[1].removeprefix("text").strip().splitlines()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    floors = [set(re.findall(r"\w+", line)) for line in drawn]
    assert floors == [set(re.findall(r"\w+", layer)) for layer in layers]


def test_invariants_have_the_numbers_that_tests_cite_and_each_has_a_test():
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", section("Invariants"), flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 18))
    assert all(re.search(r"`\w+/[\w/]*test_\w+\.py`", files) for _, files in rows)


def test_functions_and_classes_of_a_step_are_defined():
    named = set(re.findall(r"`(\w+(?:\.\w+)?)`", section("One optimizer step")))
    files = [file.read_text() for file in SOURCE.rglob("*.py")]
    defined = set(re.findall(r"^ *(?:class|def) (\w+)", "\n".join(files), flags=re.MULTILINE))
    fields = set(re.findall(r"^    (\w+):", "\n".join(files), flags=re.MULTILINE))
    assert {name for name in named if "." in name} >= {"FeedbackCollector.collect", "ObjectiveStep.pack"}
    for name in sorted(named - {"Trainer", "num_items_in_batch"}):
        owner, _, method = name.partition(".")
        assert owner in defined | fields, name
        assert not method or any(
            re.search(rf"^class {owner}\b[\s\S]*\bdef {method}\(", file, re.M) for file in files
        ), name


def test_objects_of_the_trainer_stand_where_the_page_says():
    objects = re.findall(r"^\| `(\w+)` \| `([\w/.]+)` \|", section("The parts of the trainer"), flags=re.MULTILINE)
    assert len(objects) >= 9
    assert [name for name, file in objects if f"class {name}" not in (SOURCE / file).read_text()] == []


def test_every_decision_is_linked():
    assert DECISIONS and all(f"(decisions/{file.name})" in PAGE for file in DECISIONS)


def test_the_table_of_what_to_write_names_what_there_is():
    """Each field names its file, and that file defines what is named before it."""
    rows = section("Inside the package", (ROOT / "docs/project/extending.md").read_text())
    named = re.findall(r"`@?(\w+)`(?: \([^)]*\))? in `([\w/]+\.py)`", rows)
    assert len(named) >= 9
    for name, file in named:
        assert re.search(rf"^(?:(?:def|class) )?{name}\b", (SOURCE / file).read_text(), flags=re.MULTILINE), (
            name,
            file,
        )
