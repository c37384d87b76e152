"""What a check has found."""

import pytest

from online_dpo.doctor.findings import gib, ok, problem, warning


@pytest.mark.smoke
def test_findings():
    assert (ok("a", n=1).mark, ok("a", n=1).facts) == ("ok", {"n": 1})
    assert (warning("a", "b").change, problem("a", "b").mark) == ("b", "problem")


def test_sizes():
    assert [gib(3 * 2**30), gib(200 * 2**30), gib(5 * 2**20)] == ["3.0 GiB", "200 GiB", "5 MiB"]
