"""Versions of packages against the ranges that this package was made for."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement

from online_dpo import __version__
from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, ok, problem, warning
from online_dpo.doctor.registry import check
from online_dpo.versions import TESTED, untested

NOT_INSTALLED = "online-dpo runs from a folder and is not installed, so the versions of what it requires are unknown."
SHOWN = ("torch", "transformers", "accelerate", "datasets")


@check("versions")
def versions(case: Case) -> Iterator[Finding]:
    """Installed packages against the ranges of pyproject.toml, and against those that were tested."""
    installed: dict[str, Any] = {name: text for name in TESTED if (text := installed_version(name)) is not None}
    try:
        required = requires("online-dpo") or []
    except PackageNotFoundError:
        required = []
        yield warning(NOT_INSTALLED, "Install it: pip install -e FOLDER")
    wrong = list(outside([Requirement(line) for line in required]))
    for name, text, wanted, extra in wrong:
        found = f"{name} {text} is installed, and online-dpo is made for {name}{wanted}"
        change = f"pip install '{name}{wanted}'"
        yield warning(found, change) if extra else problem(found, change)
    others = [line for line in untested(installed) if line.split()[0] not in {name for name, *_ in wrong}]
    for line in others:
        yield warning(f"online-dpo has not been tested with {line}", "Install a version that was tested.")
    if not wrong and not others:
        shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed)
        yield ok(f"online-dpo {__version__}, Python {platform.python_version()}, {shown}", **installed)


def installed_version(name: str) -> str | None:
    """Returns the version of an installed package; ``None`` where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def outside(requirements: list[Requirement]) -> Iterator[tuple[str, str, str, bool]]:
    """Yields each installed package whose version a requirement refuses: its name, version, the range that is wanted,
    and whether only an extra wants it.
    """
    seen = set()
    for one in requirements:
        text, extra = installed_version(one.name), one.marker is not None and "extra" in str(one.marker)
        is_development = extra and any(word in str(one.marker) for word in ("dev", "bench"))
        if text is None or is_development or one.name in seen or one.specifier.contains(text, prereleases=True):
            continue
        seen.add(one.name)
        yield one.name, text, str(one.specifier), extra
