"""Gold scores at equal seconds and at equal KL, of curves made by hand; the pages show what the results files say."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import quality_curves  # noqa: E402
import quality_vs_trl  # noqa: E402
from quality_curves import compared, gold_at, kl_of, seconds_of  # noqa: E402

STEPS = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())["workloads"]
README = (ROOT / "README.md").read_text()
PAGE = quality_vs_trl.PAGE.read_text()


def point(step, seconds, gold, kl):
    value = {"value": gold, "low": gold - 0.1, "high": gold + 0.1}
    return {"step": step, "cpu_seconds": seconds, "gold": value, "kl": {"value": kl, "standard_error": 0.1}}


SLOW = [point(0, 0.0, 1.0, 0.0), point(10, 20.0, 3.0, 2.0), point(20, 40.0, 5.0, 6.0)]
FAST = [point(0, 0.0, 1.0, 0.0), point(10, 10.0, 3.0, 2.0), point(20, 20.0, 5.0, 6.0), point(40, 40.0, 6.0, 5.0)]


def test_between_two_points_a_curve_is_a_line_and_there_is_nothing_behind_the_last():
    assert [gold_at(SLOW, seconds_of, x) for x in (0.0, 5.0, 20.0, 30.0, 40.0)] == [1.0, 1.5, 3.0, 4.0, 5.0]
    assert gold_at(SLOW, seconds_of, 40.1) is None and gold_at(SLOW, kl_of, 6.5) is None
    assert gold_at(SLOW, kl_of, 3.0) == 3.5


def test_a_kl_that_falls_again_is_read_in_the_order_of_the_kl():
    assert gold_at(FAST, kl_of, 5.0) == 6.0
    assert gold_at(FAST, kl_of, 5.5) == 5.5


def test_rows_are_compared_at_shares_of_the_seconds_that_all_had_and_at_each_kl_that_all_reached():
    found = compared({"trl": {"0": SLOW, "1": SLOW}, "ours": {"0": FAST, "1": SLOW}})
    assert [place["at"] for place in found["equal_seconds"]] == [5.0, 10.0, 20.0, 40.0]
    assert [place["at"] for place in found["equal_kl"]] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    at_half = found["equal_seconds"][2]["gold"]
    assert at_half["trl"] == {"mean": 3.0, "min": 3.0, "max": 3.0, "difference": 0.0, "differences": [0.0, 0.0]}
    assert at_half["ours"] == {"mean": 4.0, "min": 3.0, "max": 5.0, "difference": 1.0, "differences": [2.0, 0.0]}
    assert found["equal_kl"][1]["gold"]["ours"]["differences"] == [0.0, 0.0]
    assert found["seconds_a_step"] == {"trl": 2.0, "ours": 1.5}


def result_of(curves):
    rows = {name: {"title": name.upper(), "short": name} for name in curves}
    return {"rows": rows, "points": curves, "comparison": compared(curves)}


def test_tables_and_chart_show_each_row():
    result = result_of({"trl": {"0": SLOW, "1": SLOW}, "ours-pairs": {"0": FAST, "1": SLOW}})
    lines = quality_curves.tables(result).splitlines()
    assert lines[0] == "| CPU seconds of training | TRL | OURS-PAIRS |"
    assert "| 20 | 3.00 (3.00 to 3.00) | 4.00 (3.00 to 5.00) |" in lines
    assert lines[-1] == "CPU seconds a step: TRL 2.00, OURS-PAIRS 1.50. Seeds: 0, 1."
    assert quality_curves.readme_rows(result) == [
        "| gold score after 40 CPU seconds of training | 5.0 | 5.5 |",
        "| gold score at a KL of 4 nats | 4.0 | 4.5 |",
    ]
    picture = quality_curves.chart(result)
    assert picture.count('class="line c0"') == picture.count('class="line c1"') == 2
    assert all(
        text in picture for text in (">trl 5<", ">ours-pairs 5.5<", "CPU seconds of training", "range of 2 seeds")
    )
    page = quality_curves.with_tables(f"a\n{quality_curves.BEGIN}\nold\n{quality_curves.END}\nb\n", result)
    assert page.startswith(f"a\n{quality_curves.BEGIN}\n\n| CPU") and page.endswith("b\n") and "old" not in page


def test_page_and_chart_are_those_of_the_stored_figures():
    result = json.loads(quality_vs_trl.RESULTS.read_text())
    assert result["comparison"] == compared(result["points"])
    current = "python benchmarks/quality_vs_trl.py --chart"
    assert quality_curves.with_tables(PAGE, result) == PAGE, current
    assert quality_curves.chart(result) == quality_vs_trl.CHART.read_text(), current
    shown = [line for line in README.splitlines() if line.startswith("| gold")]
    assert not shown or shown == quality_curves.readme_rows(result), current
    fields = {name: row["fields"] for name, row in result["rows"].items()}
    two, four = {"num_completions": 2, "tie_policy": "first"}, {"num_completions": 4}
    assert fields == {"trl": {}, "ours-pairs": two, "ours": four}


def test_tables_of_steps_are_those_of_the_stored_figures():
    """Every cell of the page, and every pair of seconds or of MiB in the README."""
    [table] = re.findall(r"^\| workload \| prompt, new tokens.*\n\|[-:|]+\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert {row[0] for row in rows} == set(STEPS)
    for name, _, *cells in rows:
        assert cells == cells_of_page(STEPS[name]), name
    readme_figures = [
        (figure(trl), figure(ours)) for trl, ours in re.findall(r"\| ([\d.]+) s \| ([\d.]+) s \|", README)
    ]
    known = {(round(f["trl"]["step"]["median"], 1), round(f["ours"]["step"]["median"], 1)) for f in STEPS.values()}
    assert set(readme_figures) <= known
    memory = {tuple(re.findall(r"[\d]+", pair)) for pair in re.findall(r"\| \d+ MiB \| \d+ MiB \|", README)}
    assert memory <= {(f"{f['peak_mib']['trl']:.0f}", f"{f['peak_mib']['ours']:.0f}") for f in STEPS.values()}


def figure(text):
    return float(text)


def cells_of_page(figures):
    def seconds(part):
        trl, ours = (figures[side][part]["median"] for side in ("trl", "ours"))
        return [f"{trl:.3g}", f"{ours:.3g}", f"{trl / ours:.2f}"]

    trl, ours = (figures["peak_mib"][side] for side in ("trl", "ours"))
    shares = [f"{100 * figures['limit_share'][side]:.0f} %" for side in ("trl", "ours")]
    return [*seconds("non_generation"), *seconds("step"), f"{trl:.0f}", f"{ours:.0f}", f"{ours / trl:.2f}", *shares]
