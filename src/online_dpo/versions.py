"""The versions of other packages that this one has been tested with, and what differs between them."""

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
"""The oldest and the newest, with which `make test-oldest` and `make test-newest` run."""
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Arguments of a run that have another name in transformers from 5.23 on, where the old one warns. Here both serve."""


def warning() -> str | None:
    """What to tell the user where installed packages are older or newer than those that were tested; ``None`` where all
    are fine, and in all processes of a run but the first.
    """
    found = untested({name: installed for name in TESTED if (installed := _installed(name)) is not None})
    if not found or os.environ.get("RANK", "0") != "0":
        return None
    return (
        f"online-dpo has not been tested with {' and '.join(found)}. If something goes wrong, install versions that "
        "were tested: pip install --upgrade online-dpo"
    )


@functools.cache
def warn_once() -> None:
    """Give the `warning`, if there is one, the first time that this is called."""
    text = warning()
    if text is not None:
        warnings.warn(text, stacklevel=3)


def untested(installed: dict[str, str]) -> list[str]:
    """What is out of the range in which it was tested, told to a person.

    >>> untested({"torch": "2.13.0+cpu", "transformers": "5.25.0", "peft": "0.17.1"})
    ['transformers 5.25.0 (5.17 to 5.24)', 'peft 0.17.1 (0.18 to 0.21)']
    """
    found = []
    for name, text in installed.items():
        oldest, newest = TESTED[name]
        here = Version(text)
        if here < Version(oldest) or here.release[:2] > Version(newest).release[:2]:
            found.append(f"{name} {text} ({oldest} to {newest})")
    return found


def hand_on_checkpointing(args: Any) -> None:
    """Tell transformers what a configuration says about checkpointing by the name that it has there.

    Args:
        args: a configuration before the parent's ``__post_init__``, which afterwards has equal values under both names.
    """
    names = {field.name for field in fields(args)}
    for old, new in RENAMED.items():
        if new in names and getattr(args, new) is None:
            setattr(args, new, getattr(args, old))


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # an extra that is not there
        return None
