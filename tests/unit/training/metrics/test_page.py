"""docs/reference/metrics.md is what the descriptions say."""

from pathlib import Path

import online_dpo.training.trainer  # noqa: F401  (all that records metrics)
from online_dpo.stats.catalogue import CATALOGUE
from online_dpo.training.metrics.page import metrics_page

PAGE = Path(__file__).parents[4] / "docs" / "reference" / "metrics.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == metrics_page(), "run `make pages`"


def test_the_page_has_a_row_for_every_metric():
    page = metrics_page()
    for members in CATALOGUE.values():
        for metric in members:
            assert page.count(f"\n| `{metric.name}` | {metric.unit} | ") == 1
