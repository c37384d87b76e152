"""What has to be carried to a machine with a GPU and no package index, so that all parts run there.

Needed are the package's own requirements in pyproject.toml, those of its extras for adapters and TRL, what the parts
and their tests import, and what all of these require in turn, which is looked up in the packages that are installed
where this runs. Versions come from the file of constraints that was tested with that machine's transformers. Where
other versions are installed here, they may require other packages: then all that the file names is listed.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distributions, packages_distributions, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from gpu_parts.record import ROOT

EXTRAS = ("peft", "bench")
SOURCES = ("src/online_dpo", "benchmarks/gpu_parts", "tests/gpu")
SCRIPTS = ("gpu", "head", "measure", "memory_estimate", "rollout", "step", "trainers", "vs_trl", "worker", "workloads")
SUPPORT = ("tiny", "training", "single_sequences")
OPTIONAL = {"vllm", "liger-kernel", "deepspeed", "ray", "bitsandbytes", "torchao"}
"""Parts tell where these are missing, and go on."""
CONSTRAINTS = ("constraints-oldest.txt", "constraints.txt")
DECIDING = "transformers"
PARTS_OF_TORCH = ("triton",)
"""What its CUDA builds bring, and others do without."""


def read_versions(lines: list[str]) -> dict[str, str]:
    """Names and versions of a list such as `pip freeze` gives; what has no version, such as a folder, is left out.

    >>> read_versions(["torch==2.11.0+cu130", "# a comment", "-e ."])
    {'torch': '2.11.0+cu130'}
    """
    found = (re.match(r"\s*([A-Za-z0-9][\w.-]*)\s*==\s*([^\s;#]+)", line) for line in lines)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def constraints_for(installed: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The file of constraints whose transformers is nearest to that which is installed, and not newer; its versions."""
    files = [(name, read_versions((ROOT / name).read_text().splitlines())) for name in CONSTRAINTS]
    there = installed.get(DECIDING)
    if there is None:
        return files[-1]
    old_enough = [(name, pinned) for name, pinned in files if Version(pinned[DECIDING]) <= Version(there)]
    return (old_enough or files)[-1 if old_enough else 0]


def declared() -> list[Requirement]:
    """What pyproject.toml asks for: the package, and the extras that parts use."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def imported() -> set[str]:
    """The packages that parts and their tests import, as far as they are installed here."""
    files = [path for folder in SOURCES[1:] for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "benchmarks" / f"{name}.py" for name in SCRIPTS]
    files += [ROOT / "tests" / "support" / f"{name}.py" for name in SUPPORT]
    modules = {module for path in files for module in _modules(ast.parse(path.read_text()))}
    of_module = packages_distributions()
    own = {"online-dpo", "pip", "setuptools"}
    names = {canonicalize_name(name) for module in modules for name in of_module.get(module, ())}
    return names - own - OPTIONAL


def _modules(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def needed(marker_values: dict[str, str]) -> dict[str, list[Requirement]]:
    """All packages that are needed, each with what is required of it."""
    wanted: dict[str, list[Requirement]] = {}
    waiting = [*declared(), *(Requirement(name) for name in sorted(imported()))]
    seen: set[tuple[str, str, frozenset[str]]] = set()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        values = [marker_values | {"extra": extra} for extra in ("", *one.extras)]
        key = (name, str(one.specifier), frozenset(one.extras))
        if key in seen or name in OPTIONAL:
            continue
        seen.add(key)
        wanted.setdefault(name, []).append(one)
        for line in _requirements(name):
            below = Requirement(line)
            if below.marker is None or any(below.marker.evaluate(each) for each in values):
                waiting.append(below)
    return wanted


def _requirements(name: str) -> list[str]:
    """What an installed package requires. Of one that is not installed here nothing is known."""
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def missing(installed: dict[str, str], marker_values: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Packages that have to be carried, with the version of each, and remarks."""
    here = {canonicalize_name(d.metadata["Name"]): d.version for d in distributions()}
    name_of_file, pinned = constraints_for(installed)
    wanted, remarks = needed(marker_values), []
    others = [n for n in wanted if n in pinned and Version(pinned[n]).public != Version(here.get(n, "0")).public]
    if installed != here and others:
        remarks.append(
            f"{', '.join(sorted(others))}: {name_of_file} has other versions than are installed here, so all of it is "
            "listed. An environment that is made with that file lists fewer."
        )
        wanted = {name: [] for name in pinned if name not in OPTIONAL} | wanted
    carried = {}
    for name, requirements in sorted(wanted.items()):
        there = installed.get(name)
        if name.startswith(("cuda-", "nvidia-")) and name != "nvidia-ml-py" or name in PARTS_OF_TORCH and there is None:
            continue  # torch's own build brings them, or needs none
        asked = (one for one in requirements if one.marker is None or "extra" not in str(one.marker))
        refused = {str(one) for one in asked if there and not one.specifier.contains(there, prereleases=True)}
        if there is not None and not refused:
            continue
        if there is not None:
            remarks.append(f"{name} {there} is there, and {' and '.join(sorted(refused))} is required.")
        if name in ("torch", DECIDING):
            remarks.append(f"{name} is not carried: take an image with one that pyproject.toml allows.")
        elif name in pinned or name in here:
            carried[name] = pinned.get(name, here.get(name, ""))
        else:
            remarks.append(f"{name}: no version of it is known here.")
    return carried, remarks


def print_wheels(installed: Path | None, python: str | None) -> int:
    """Prints a line for each package that is missing, as pip reads it; remarks go to stderr."""
    if installed is None:
        there = {canonicalize_name(d.metadata["Name"]): d.version for d in distributions()}
    else:
        there = read_versions(installed.read_text().splitlines())
        if not there:
            print(f"gpu.py: error: {installed} names no package with a version (name==1.2.3)", file=sys.stderr)
            return 2
    carried, remarks = missing(there, _markers(python))
    for name, version in carried.items():
        print(f"{name}=={version}")
    for remark in remarks:
        print(f"# {remark}", file=sys.stderr)
    if carried:
        version = python or f"{sys.version_info.major}.{sys.version_info.minor}"
        print(
            "# Download here: pip download --no-deps --only-binary :all: "
            f"--python-version {version} --dest wheels -r LIST\n"
            "# Install there: pip install --no-index --no-deps wheels/*.whl",
            file=sys.stderr,
        )
    return 0


def _markers(python: str | None) -> dict[str, Any]:
    """Values of the markers of requirements, for another Python if one is named."""
    from packaging.markers import default_environment

    values: dict[str, Any] = dict(default_environment())
    if python is not None:
        values |= {"python_version": python, "python_full_version": f"{python}.0"}
    return values
