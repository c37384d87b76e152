"""Colours that can be read in both themes, numbers in a few characters, and what comes from elsewhere."""

import re
import time
from itertools import product

import pytest

from online_dpo.dashboard import formats
from online_dpo.dashboard.context import HERE
from online_dpo.dashboard.sparkline import sparkline

STATIC = HERE / "static"


def palette():
    """The colours by name: (light, dark)."""
    css = (STATIC / "base.css").read_text()
    return {name: colours for name, *colours in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)}


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_texts_can_be_read_on_their_grounds_in_both_themes():
    colours = palette()
    texts = ["text", "muted", "accent", *(name for name in colours if name.startswith("series-"))]
    pairs = [*product(texts, ("ground", "panel")), ("text", "raised"), ("muted", "raised"), ("accent", "accent-ground")]
    pairs += [(name, f"{name}-ground") for name in ("good", "bad", "warn")]
    for (text, ground), theme in product(pairs, (0, 1)):
        found = contrast(colours[text][theme], colours[ground][theme])
        assert found >= 4.5, f"{text} on {ground}, {('light', 'dark')[theme]}: {found:.2f}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (0, "0"), (1234567, "1,234,567"), (0.69314, "0.6931"), (-0.05, "-0.05000")]
    + [(1e-6, "1.00e-6"), (123456.7, "1.23e5"), (12.345678, "12.35"), (1e300, "1.00e300"), (99999.99, "100000")],
)
def test_numbers_take_a_few_characters(value, text):
    assert formats.number(value) == text


def test_times_are_told_in_their_largest_units():
    assert formats.duration(59) == "59 s"
    assert formats.duration(3661) == "1 h 1 min"
    assert formats.duration(-1) == formats.duration(None) == "–"
    assert formats.ago(time.time() - 7300) == "2 h ago"
    assert formats.ago(1e300) == "–" and formats.clock(-5) == "–"


def test_a_sparkline_fills_its_picture():
    assert sparkline([(0, 1.0), (10, 2.0)]) == "2.0,22.0 118.0,2.0"
    assert sparkline([(5, 1.0), (5, 1.0)]).count(",") == 2
    assert sparkline([(1, 1.0)]) == sparkline([]) == ""


def test_what_comes_from_elsewhere_has_its_licence_and_version():
    for name, file in (("htmx", "htmx.min.js"), ("uplot", "uPlot.esm.js")):
        folder = STATIC / "vendor" / name
        version = (folder / "VERSION").read_text().strip()
        assert (folder / "LICENSE").is_file() and version in (folder / file).read_text(), name


def test_no_page_has_scripts_or_styles_of_its_own_or_addresses_elsewhere():
    own = [path for path in STATIC.rglob("*") if path.suffix in (".js", ".css", ".svg") and "vendor" not in path.parts]
    for path in [*(HERE / "templates").glob("*.html"), *own]:
        text = path.read_text()
        assert not re.search(r"(?<!xmlns=\")https?://", text), path
        if path.suffix == ".html":
            assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=|\|\s*safe|javascript:", text), path
        elif path.suffix == ".js":
            assert not re.search(r"\beval\(|new Function|innerHTML\s*=|insertAdjacentHTML|document\.write", text), path
