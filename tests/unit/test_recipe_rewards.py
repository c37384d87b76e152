"""The GSM8K reward of the recipes, against values by hand and the dataset's own answers."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "gsm8k-test.jsonl"
spec = importlib.util.spec_from_file_location("gsm8k", ROOT / "recipes" / "rewards" / "gsm8k.py")
gsm8k = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gsm8k)

GOLD = "He has 2*3=<<2*3=6>>6.\n#### 1,006"


@pytest.mark.parametrize(
    "text, expected",
    [
        (GOLD, 3.0),
        ("#### 1006", 2.0),
        ("#### 7", 1.0),
        ("<<2*3=6>> and <<2*3=7>>\n#### 7", 1.5),
        ("<<2*3=6>>", 1.0),
        ("", 0.0),
        ("#### 1006 and more text", 0.0),
        ("we say #### 1006", 0.0),
        ("<<__import__('os').getcwd()=1>>", 0.0),
        ("<<1/0=1>> <<2**99999999=1>> <<(=1>>", 0.0),
        ("<<50%=0.5>> <<$4+.5=4.5>> <<-3+5=2>> <<10/3=3.33>>", 1.0),
        ("<<10/3=3.3>>", 0.0),
    ],
)
def test_values(text, expected):
    assert gsm8k.format_reward([text], [GOLD]) == [expected]


@pytest.mark.skipif(not DATA.is_file(), reason="the example data is not here")
def test_the_datasets_own_answers_get_nearly_full_marks():
    answers = [json.loads(line)["answer"] for line in DATA.read_text().splitlines()]
    scores = gsm8k.format_reward(answers, answers)
    assert sum(scores) / len(scores) > 2.9
    assert sum(score == 3.0 for score in scores) > 0.93 * len(scores)
