"""Configurations without a trainer, for tests of what they accept."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from online_dpo import OnlineDPOConfig


def made(**fields: Any) -> OnlineDPOConfig:
    """A configuration on a CPU. Warnings are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return OnlineDPOConfig(output_dir="out", use_cpu=True, **fields)


def check_range(name: str, wanted: str, inside: list[Any], outside: list[Any], **beside: Any) -> None:
    """A field takes all numbers ``inside``, and none ``outside``, for which the message says what is ``wanted``."""
    for value in inside:
        assert getattr(made(**beside, **{name: value}), name) == value
    for value in outside:
        with pytest.raises(ValueError, match=re.escape(f"`{name}` must be {wanted}; it is {value!r}.")):
            made(**beside, **{name: value})


def refused(message: str, **fields: Any) -> None:
    """These fields together are refused; the message holds this text."""
    with pytest.raises(ValueError, match=re.escape(message)):
        made(**fields)


def ignored(message: str, **fields: Any) -> None:
    """These fields give one warning, which is this text and points to this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        OnlineDPOConfig(output_dir="out", use_cpu=True, **fields)
    [warning] = [one for one in caught if issubclass(one.category, UserWarning)]
    assert (str(warning.message), warning.filename) == (message, __file__)
