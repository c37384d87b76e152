"""The tested versions of other packages, and the differences between these versions."""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

TESTED = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.17", "5.24"),
    "accelerate": ("1.13", "1.15"),
    "datasets": ("4.7", "5.2"),
    "peft": ("0.18", "0.21"),
}
"""The oldest and the newest tested version of each package (`make test-oldest`, `make test-newest`)."""
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Arguments that transformers has renamed in 5.23, old name to new. There the old name warns; here both can be used."""


def warning() -> str | None:
    """The warning about installed packages that are older or newer than the tested versions; ``None`` if there are
    none, and in all processes of a run but the first.
    """
    outside = untested({name: installed for name in TESTED if (installed := _installed(name)) is not None})
    if not outside or os.environ.get("RANK", "0") != "0":
        return None
    return (
        f"online-dpo has not been tested with {' and '.join(outside)}. If something goes wrong, install versions that "
        "were tested: pip install --upgrade online-dpo"
    )


@functools.cache
def warn_once() -> None:
    """Issues the `warning`, if there is one, at the first call."""
    text = warning()
    if text is not None:
        warnings.warn(text, stacklevel=3)


def untested(installed: dict[str, str]) -> list[str]:
    """Descriptions of the installed packages whose version is outside of the tested range.

    >>> untested({"torch": "2.13.0+cpu", "transformers": "5.25.0", "peft": "0.17.1"})
    ['transformers 5.25.0 (5.17 to 5.24)', 'peft 0.17.1 (0.18 to 0.21)']
    """
    outside = []
    for name, text in installed.items():
        oldest, newest = TESTED[name]
        version_here = Version(text)
        if version_here < Version(oldest) or version_here.release[:2] > Version(newest).release[:2]:
            outside.append(f"{name} {text} ({oldest} to {newest})")
    return outside


def copy_checkpointing_fields(args: Any) -> None:
    """Copies the gradient-checkpointing fields of a configuration to the names that the installed transformers reads.

    Args:
        args: a configuration before the parent's ``__post_init__``, which then gives both names equal values.
    """
    names = {field.name for field in fields(args)}
    for old, new in RENAMED.items():
        if new in names and getattr(args, new) is None:
            setattr(args, new, getattr(args, old))


def _installed(name: str) -> str | None:
    """The installed version of a package, or ``None``."""
    try:
        return version(name)
    except PackageNotFoundError:  # an extra that is not installed
        return None
