"""The README stands on the package's page as well, where nothing is beside it: its links name the repository."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
LINKS = re.findall(r"\]\(([^)]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", README)
LINKS = [of_markdown or of_html for of_markdown, of_html in LINKS]
IMAGES = ROOT / "docs" / "images"


def test_links_into_the_repository_name_it_and_lead_to_what_is_there():
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    inside = [link for link in LINKS if link.startswith(repository)]
    assert len(inside) >= 6
    for link in inside:
        kind, branch, path = link.removeprefix(f"{repository}/").split("/", 2)
        place = ROOT / path.partition("#")[0]
        assert branch == "main" and (place.is_dir() if kind == "tree" else place.is_file()), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_pages_lead_to_what_is_there(page):
    prose = re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        file, _, heading = link.partition("#")
        if link.startswith("https://"):
            continue
        target = page.parent / file if file else page
        assert target.is_file(), link
        if not heading:  # such as a picture, which is no text
            continue
        headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
        names = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
        assert heading in names, link


def test_no_link_is_relative():
    assert all(link.startswith("https://") for link in LINKS)


def test_it_fits_on_two_screens():
    assert len(README.splitlines()) <= 110 and README.count("```python") == 1


def test_it_is_honest_about_gpus():
    assert "No GPU has been measured yet" in README


def test_every_picture_is_shown_somewhere_and_made_by_a_script():
    """Those that a page shows are there: other tests follow its links."""
    shown = "".join(page.read_text() for page in [ROOT / "README.md", *PAGES])
    scripts = "".join(script.read_text() for script in (ROOT / "benchmarks").rglob("*.py"))
    pictures = [path.name for path in IMAGES.iterdir()]
    assert [name for name in pictures if f"images/{name}" not in shown] == []
    assert [name for name in pictures if f'{name}"' not in scripts] == []
    assert [name for name in pictures if (IMAGES / name).stat().st_size > 200_000] == []


def test_code_and_tests_that_the_page_on_security_names_are_there():
    page = (ROOT / "SECURITY.md").read_text()
    names = {name for name in re.findall(r"`([\w/]+\.py|(?:unit|faults|vllm_engines)/[\w/]*)`", page)}
    assert len(names) > 30
    places = (ROOT / "src/online_dpo", ROOT / "tests")
    assert not [name for name in names if not any((place / name).exists() for place in places)]
