"""The fields of the methods and of an adapting beta: which values they take."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from online_dpo.config.method import MethodName
from support.configuration import check_range, ignored, made, refused


@pytest.mark.parametrize(
    ("name", "wanted", "inside", "outside"),
    [
        ("xpo_alpha", "0 or more, or a list of such numbers", [0.0, 2.0, [0.1, 0.0]], [-1.0, [0.1, math.inf], []]),
        ("mixture_coef", "in [0, 1], or a list of such numbers", [0.0, 1.0, [0.5, 0.0]], [-0.1, 1.1, [0.5, 2.0], []]),
        ("target_kl", "above 0", [None, 1e-3], [0.0, math.inf]),
        ("beta_range", "above 1", [1.1, 100.0], [1.0, math.inf]),
        ("beta_gain", "above 0 and below 5, so that beta stays above 0", [1e-3, 4.9], [0.0, 5.0]),
    ],
)
def test_ranges(name: str, wanted: str, inside: list[Any], outside: list[Any]) -> None:
    check_range(name, wanted, inside, outside)


def test_choices() -> None:
    for choice in get_args(MethodName):
        assert made(method=choice).method == choice
    refused("`method` must be one of online_dpo, xpo, nash_md; it is 'nash'. Did you mean `nash_md`?", method="nash")


def test_an_adapting_beta_is_one_number_of_a_loss_with_a_reference() -> None:
    assert made(target_kl=6.0).target_kl == 6.0
    refused("`target_kl` adapts `beta`, so that it cannot be a list by epochs", target_kl=6.0, beta=[0.2, 0.1])
    refused("`target_kl` needs a loss whose beta pulls towards the reference", target_kl=6.0, loss_type="simpo")
    ignored("Ignored without `target_kl`: beta_gain, beta_range.", beta_gain=0.2, beta_range=3.0)
