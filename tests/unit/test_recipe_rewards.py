"""The rewards of the recipes, against values by hand and the answers of GSM8K."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "gsm8k-test.jsonl"


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / "rewards" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gsm8k, mixed, thinking = map(loaded, ("gsm8k", "mixed", "thinking"))

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


def chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("So there are 1,006 of them.", "1006", 1.0),
        ("First 7, then 8", "7", 0.0),
        (r"It is \boxed{\dfrac{3}{4}}. Or 5?", r"\frac{3}{4}", 1.0),
        (r"\boxed{1} and then \boxed{2}", "1", 0.0),
        ("no number", "1", 0.0),
        ("", "1", 0.0),
    ],
)
def test_mathematics_of_mixed_rows(text, truth, expected):
    for completion in (text, chat(text)):
        assert mixed.mathematics([completion] * 3, [truth] * 3, ["gsm8k", "MATH", "ifeval"]) == [
            *(expected, expected, None)
        ]


@pytest.mark.parametrize(
    ("text", "check", "expected"),
    [
        ("all small", {"func_name": "validate_lowercase"}, 1.0),
        ("Not all", {"func_name": "validate_lowercase"}, 0.0),
        ("one *** two", {"func_name": "verify_paragraph_count", "N": 2}, 1.0),
        ("Rain on the ROAD", {"func_name": "verify_keywords", "keyword_list": ["rain", "road"]}, 1.0),
        ("rain", {"func_name": "verify_keywords", "keyword_list": ["rain", "road"]}, 0.0),
        ("rain", {"func_name": "validate_forbidden_words", "forbidden_words": ["road"]}, 1.0),
        ("The end. ", {"func_name": "validate_end", "end_phrase": "end."}, 1.0),
        ("anything", {"func_name": "a_check_that_is_not_written"}, None),
    ],
)
def test_instructions_of_mixed_rows(text, check, expected):
    truth = json.dumps(check)
    assert mixed.instructions([chat(text)] * 2, [truth] * 2, ["ifeval", "gsm8k"]) == [expected, None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"<think>\n\boxed{9}?\n</think>\nIt is $\boxed{7}$.", 1.0),
        (r"short</think>\boxed{9}", 0.0),
        (r"<think>\boxed{7}", 0.0),
        ("<think>7</think>7", 0.0),
        (r"x</think>\boxed{7", 0.0),
    ],
)
def test_what_comes_after_the_thought_counts(text, expected):
    assert thinking.right_after_thinking([text, chat(text)], ["$7$", "7"]) == [expected, expected]
