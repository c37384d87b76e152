"""The layout: tests mirror packages, packages load nothing heavy, and names in strings are those of what they mean."""

import ast
import json
import pkgutil
import re
from pathlib import Path

import pytest

import online_dpo
from online_dpo.cli import serve
from online_dpo.rollout.vllm import worker
from support.processes import run_python

SOURCE = Path(online_dpo.__file__).parent
UNIT = Path(__file__).parent
PACKAGES = {file.parent.relative_to(SOURCE) for file in SOURCE.rglob("__init__.py")} - {Path(".")}
WITH_CODE = {package for package in PACKAGES if len(list((SOURCE / package).glob("*.py"))) > 1}
HEAVY = ("torch", "transformers", "transformers.trainer", "accelerate", "datasets")
NAME = re.compile(r"online_dpo(\.\w+)*(:\w+)?")


def folders_of_tests():
    return {file.parent.relative_to(UNIT) for file in UNIT.rglob("test_*.py")} - {Path(".")}


def strings_of(file):
    constants = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant))
    return {node.value for node in constants if isinstance(node.value, str)}


@pytest.fixture(scope="module")
def loaded():
    """By the name of a package (and of the workers' module, the last), the heavy modules that are there after its
    import. All are imported one after the other in a fresh interpreter.
    """
    names = [".".join(("online_dpo", *package.parts)) for package in sorted(PACKAGES)]
    code = (
        "import importlib, json, sys\n"
        f"def heavy(name):\n    importlib.import_module(name)\n    return [m for m in {HEAVY!r} if m in sys.modules]\n"
        f"print(json.dumps({{name: heavy(name) for name in {[*names, worker.__name__]!r}}}))"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_folders_of_unit_tests_are_those_of_packages():
    assert folders_of_tests() <= PACKAGES
    assert folders_of_tests() >= WITH_CODE


@pytest.mark.parametrize("name", ["vllm", "ray", "deepspeed", "openai", "peft", "trl"])
def test_no_folder_of_tests_looks_like_an_optional_package(name):
    """`tests` is where helpers are imported from: a folder there is found as a package, installed or not."""
    assert not (UNIT.parent / name).exists()


def test_the_root_holds_six_modules_at_most():
    assert len(list(SOURCE.glob("*.py"))) <= 6


def test_packages_load_nothing_heavy(loaded):
    *packages, _ = loaded
    assert {name: loaded[name] for name in packages if loaded[name]} == {}


def test_workers_of_vllm_load_nothing_of_the_trainers(loaded):
    assert loaded[worker.__name__] == ["torch"]


def test_what_servers_mix_into_their_workers_is_the_class_of_that_name():
    path = f"{worker.WeightUpdates.__module__}.{worker.WeightUpdates.__qualname__}"
    assert worker.EXTENSION == serve.EXTENSION == path


def test_names_in_strings_are_there():
    named = {text for file in SOURCE.rglob("*.py") for text in strings_of(file) if NAME.fullmatch(text)}
    assert serve.EXTENSION in named and "online_dpo.config.trainer_config" in named
    for name in sorted(named):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("package", sorted(package.name for package in PACKAGES if len(package.parts) == 1))
def test_every_package_has_a_smoke_test(package):
    assert [file for file in (UNIT / package).rglob("test_*.py") if "@pytest.mark.smoke" in file.read_text()]
