"""Names that users write: those of `tests/public_names.json` are there, and new ones stand in it."""

import json
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import online_dpo
from support.processes import run_python

LIST = Path(__file__).parents[1] / "public_names.json"
PINNED = json.loads(LIST.read_text())
GONE = """{kind}: {names} is gone, which users may have in their scripts and run files.
Let the old name go on for one minor release, with a DeprecationWarning that names the new one. Say so in CHANGELOG.md,
under "Deprecated", and once it goes under "Removed". Then take it out of tests/public_names.json."""
NEW = """{kind}: {names} is new. Is it meant for users? They will rely on it.
If so, take it into the list: PYTHONPATH=tests python -m support.public_names > tests/public_names.json"""


@pytest.fixture(scope="module")
def there():
    """The names as they are in a fresh process, where no test has registered anything."""
    done = run_python("-m", "support.public_names")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", PINNED)
def test_no_public_name_goes_or_comes_unseen(there, kind):
    gone, new = set(PINNED[kind]) - set(there.get(kind, [])), set(there.get(kind, [])) - set(PINNED[kind])
    assert not gone, GONE.format(kind=kind, names=", ".join(sorted(gone)))
    assert not new, NEW.format(kind=kind, names=", ".join(sorted(new)))


def test_every_kind_of_name_is_in_the_list(there):
    assert list(there) == list(PINNED)


@pytest.mark.parametrize("module", ["online_dpo", "online_dpo.config", "online_dpo.doctor", "online_dpo.scoring"])
def test_public_names_can_be_imported(module):
    package = import_module(module)
    assert [name for name in package.__all__ if getattr(package, name) is None] == []
    assert set(package.__all__) <= set(dir(package))


def test_the_version_is_the_citations():
    root = Path(__file__).parents[2]
    lines = (root / "CITATION.cff").read_text().splitlines()
    assert f"version: {online_dpo.__version__}" in lines
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert f"license: {project['license']}" in lines
    assert f'repository-code: "{project["urls"]["Repository"]}"' in lines
    assert f'url: "{project["urls"]["Documentation"]}"' in lines


def test_the_version_is_told_without_loading_torch():
    code = (
        "import sys\nfrom online_dpo.cli.main import main\n"
        "try:\n    main(['--version'])\nfinally:\n"
        "    print(sorted({'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & sys.modules.keys()))"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"online-dpo {online_dpo.__version__}\n[]\n"
