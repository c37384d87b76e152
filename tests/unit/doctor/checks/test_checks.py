"""Parts of checks that need no run."""

import pytest
from packaging.requirements import Requirement

from online_dpo.doctor.checks.device import count_of
from online_dpo.doctor.checks.prompts import histogram
from online_dpo.doctor.checks.rewards import Scored, length_correlation
from online_dpo.doctor.checks.versions import installed_version, outside


def test_a_package_outside_of_its_range():
    here = installed_version("packaging")
    required = [Requirement("packaging<1"), Requirement("pyyaml>=1"), Requirement("not-installed-here>=1")]
    assert list(outside(required)) == [("packaging", here, "<1", False)]
    of_extra = Requirement("packaging<1; extra == 'vllm'")
    assert list(outside([of_extra])) == [("packaging", here, "<1", True)]
    assert list(outside([Requirement("packaging<1; extra == 'dev'")])) == []


def test_a_histogram_marks_the_limit():
    assert list(histogram([1, 1, 2, 9, 12], limit=9)) == [
        "     1 to 2      ######################## 3",
        "     3 to 4                               0",
        "     5 to 6                               0",
        "     7 to 8                               0",
        "     9 to 10     ########                 1 <- limit",
        "    11 to 12     ########                 1",
    ]


def scored(values, lengths, groups):
    return Scored(None, values, lengths, groups, 0.0)  # pyright: ignore[reportArgumentType]


def test_length_is_compared_within_a_prompt():
    """Between prompts, long answers have low scores; within each, they have high ones."""
    lengths, groups = [1, 2, 3, 4, 11, 12, 13, 14], [0] * 4 + [1] * 4
    values = [10.0, 11.0, 12.0, 13.0, 0.0, 1.0, 2.0, 3.0]
    assert length_correlation(scored(values, lengths, groups)) == pytest.approx(1.0)
    assert length_correlation(scored([1.0] * 8, lengths, groups)) is None
    assert length_correlation(scored([*values[:7], None], lengths, groups)) is None  # too few


def test_counts():
    assert [count_of(494_032_768), count_of(7.6e9), count_of(1234)] == ["494 million", "7.6 billion", "1234"]
