"""What `make dist` has built, file by file: all of the package and nothing else."""

import email
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import online_dpo

ROOT = Path(__file__).parents[2]
NAME = f"online_dpo-{online_dpo.__version__}"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_IN_SDIST = {".dockerignore", ".gitignore"}


def in_repository(*folders):
    """Files that git knows, or would add."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name for name in names if name and (ROOT / name).is_file()}


def of_package():
    """Files of ``src``, with those behind its link `recipes`: archives of setuptools know no links."""
    return in_repository("src") | {f"src/online_dpo/{name}" for name in in_repository("recipes")}


@pytest.fixture(scope="module")
def wheel():
    """Contents by name."""
    with zipfile.ZipFile(ROOT / "dist" / f"{NAME}-py3-none-any.whl") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist():
    """Contents by name, without the folder that holds all of them."""
    with tarfile.open(ROOT / "dist" / f"{NAME}.tar.gz") as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        assert {PurePosixPath(member.name).parts[0] for member in files} == {NAME}
        return {member.name.removeprefix(f"{NAME}/"): archive.extractfile(member).read() for member in files}


def test_no_other_distribution_is_built():
    assert {file.name for file in (ROOT / "dist").iterdir()} == {f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz"}


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel):
    code = {name: data for name, data in wheel.items() if ".dist-info/" not in name}
    source = {name.removeprefix("src/"): (ROOT / name).read_bytes() for name in of_package()}
    assert code.keys() == source.keys()
    assert [name for name in code if code[name] != source[name]] == []
    data = {
        "py.typed",
        "run.schema.json",
        "quickstart/run.yaml",
        "recipes/qlora.yaml",
        "runs/report/page.html",
        "dashboard/templates/run.html",
    }
    assert {f"online_dpo/{name}" for name in data} <= code.keys()


def test_the_wheel_says_what_it_is(wheel):
    about = f"{NAME}.dist-info/"
    metadata = email.message_from_bytes(wheel[f"{about}METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("online-dpo", online_dpo.__version__)
    assert metadata["Requires-Python"] == ">=3.11" and metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert wheel[f"{about}entry_points.txt"].decode().split("\n")[:2] == [
        "[console_scripts]",
        "online-dpo = online_dpo.cli.process:run",
    ]
    licenses = {name.removeprefix(f"{about}licenses/") for name in wheel if name.startswith(f"{about}licenses/")}
    vendored = {name for name in in_repository("src") if name.endswith("/LICENSE")}
    assert licenses == {"LICENSE", *vendored} and len(vendored) == 2


def test_the_source_distribution_holds_the_repository_and_no_rubbish(sdist):
    made = {name for name in sdist if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert sdist.keys() - made == (in_repository() | of_package()) - NOT_IN_SDIST
    assert [name for name in sdist.keys() - made if sdist[name] != (ROOT / name).read_bytes()] == []


def test_no_distribution_is_large(wheel):
    """Nothing that a run wrote has come in: 1.2 and 3.2 MB when this was written."""
    assert max((ROOT / "dist").iterdir(), key=lambda file: file.stat().st_size).stat().st_size < 8e6
