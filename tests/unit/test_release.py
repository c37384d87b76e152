"""A release is refused when its tag, its version, its changelog and its citation do not agree."""

import importlib.util
import re
from pathlib import Path

import pytest

import online_dpo

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("check_release", ROOT / "scripts/check_release.py")
check_release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_release)

READY = """# Changelog

## [Unreleased]

## [1.2.0] - 2026-01-31

### Added

- Something.

## [1.1.0] - 2025-12-01

- Old.
"""


@pytest.fixture
def root(tmp_path):
    """A repository that is ready to release 1.2.0."""
    (tmp_path / "src/online_dpo").mkdir(parents=True)
    (tmp_path / "src/online_dpo/__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text(READY)
    return tmp_path


def test_a_release_that_is_ready(root):
    assert check_release.problems("v1.2.0", root) == []


@pytest.mark.parametrize("tag", ["v1.2.1", "1.2.0", ""])
def test_another_tag(root, tag):
    [problem] = check_release.problems(tag, root)
    assert problem.endswith("asks for v1.2.0")


def test_a_citation_of_another_version(root):
    (root / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.1.0\n")
    assert check_release.problems("v1.2.0", root) == ["CITATION.cff says 1.1.0, src/online_dpo/__init__.py 1.2.0"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[1.2.0] - 2026-01-31", "[Unreleased]", "has no section `## [1.2.0] - YEAR-MONTH-DAY`"),
        ("[1.2.0] - 2026-01-31", "[1.2.0]", "has no section"),
        ("[1.2.0]", "[1x2y0]", "has no section"),
        ("- Something.\n", "", "has no entry"),
    ],
)
def test_a_changelog_that_is_not_ready(root, old, new, problem):
    (root / "CHANGELOG.md").write_text(READY.replace(old, new))
    [found] = check_release.problems("v1.2.0", root)
    assert problem in found


def test_this_changelog_keeps_its_form():
    """Sections that `check_release` finds, with the usual kinds of change, and no entry longer than a few lines."""
    text = (ROOT / "CHANGELOG.md").read_text()
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title) for title in titles[1:])
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    unreleased = text.split("\n## ")[1]
    assert "\n- " in unreleased or f"[{online_dpo.__version__}]" in text
    assert [entry for entry in re.split(r"^- ", text, flags=re.MULTILINE) if len(entry) > 700] == []
