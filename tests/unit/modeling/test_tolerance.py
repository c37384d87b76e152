"""How far a quantised trainer and its sampler may differ."""

import pytest

from online_dpo.modeling.tolerance import QUANTIZATION, quantized_tolerance


@pytest.mark.parametrize("kind", QUANTIZATION)
def test_the_first_check_allows_what_its_way_to_quantise_can_change(kind):
    assert quantized_tolerance(kind, 1e-4, None) == QUANTIZATION[kind]


@pytest.mark.parametrize(
    "first, allowed",
    [(1e-6, 1e-4), (0.01, 0.04), (0.2, 0.8), (0.9, 1.0)],
    ids=["not below rounding", "four times the first", "near the most", "not above the most"],
)
def test_later_checks_are_held_against_the_first(first, allowed):
    assert quantized_tolerance("nf4", 1e-4, first) == pytest.approx(allowed)


@pytest.mark.parametrize("kind", [None, "gptq"])
@pytest.mark.parametrize("first", [None, 0.0, 0.5])
def test_without_a_measured_way_to_quantise_rounding_alone_is_allowed(kind, first):
    assert quantized_tolerance(kind, 0.12, first) == 0.12


def test_coarse_rounding_is_never_narrowed():
    assert quantized_tolerance("int8", 0.5, 0.3) == 0.5
