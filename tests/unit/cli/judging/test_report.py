"""`online-dpo judge`: what it accepts, what it reports and writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from online_dpo.cli.main import main
from online_dpo.config.llm_judge import JudgeSettings
from online_dpo.stats.intervals import wilson_interval
from support.endpoint import Answer, error, says, serving, shown
from support.pairwise_folders import pairrm_folder, pairrm_log_odds
from support.processes import run_python

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name, rows):
    path = Path(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(endpoint, *words):
    return main(["judge", *words, "--model", "org/judge", "--base-url", endpoint.url, "--cache", "cache.sqlite3"])


def longer_wins(body, number):
    first, second = shown(body)
    return says("A", 0.9) if len(first) > len(second) else says("B", 0.1)


ROWS = [
    *({"prompt": f"p{i}", "chosen": "long answer", "rejected": "short"} for i in range(6)),
    *({"prompt": f"q{i}", "chosen": "short", "rejected": "long answer"} for i in range(2)),
]


@pytest.mark.smoke
def test_agreement_and_cost_are_reported_and_labels_written(capsys):
    path = written("pairs.jsonl", ROWS)
    with serving(longer_wins) as endpoint:
        assert run(endpoint, path, "--output", "out.jsonl", "--input-price", "10", "--output-price", "100") == 0
        printed = capsys.readouterr().out
        assert len(endpoint.seen) == 16
        assert run(endpoint, path) == 0
        assert len(endpoint.seen) == 16 and "requests                        0\n" in capsys.readouterr().out
    low, high = wilson_interval(0.75, 8)
    lines = [line.split("  ")[-1].strip() for line in printed.splitlines()]
    assert lines[0] == "Judge judge" and "8, of which 8 have a preference" in lines
    assert f"0.750, 95 % interval {low:.3f} to {high:.3f}, 8 labels" in lines
    assert "0.500 (fair: 0.5)" in lines and "0.000" in lines and "0.0176" in lines
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row.pop("preference") for row in rows] == [pytest.approx(0.9)] * 6 + [pytest.approx(0.1)] * 2
    assert [row.pop("judge") for row in rows] == ["judge"] * 8 and rows == ROWS


def test_no_answer_at_all_is_a_failure(capsys):
    with serving(lambda body, number: error(400, "no such format")) as endpoint:
        assert run(endpoint, written("pairs.jsonl", ROWS)) == 1
    printed = capsys.readouterr()
    assert "8, of which 0 have a preference" in printed.out
    assert "error: no pair has a preference" in printed.err and "no such format" in printed.err


@pytest.mark.parametrize(
    "line, words, message",
    [
        ("not json", (), "pairs.jsonl:1: the line is no JSON"),
        ('{"prompt": "p", "chosen": "x"}', (), "pairs.jsonl:1: no `rejected`"),
        ('{"prompt": "p", "chosen": "x", "rejected": "y"}', ("--limit", "0"), "--limit must be 1 or more; it is 0"),
    ],
)
def test_what_is_wrong_with_a_file(line, words, message, capsys):
    Path("pairs.jsonl").write_text(line + "\n")
    assert main(["judge", "pairs.jsonl", "--model", "m", "--base-url", "http://localhost:1/v1", *words]) == 2
    assert message in capsys.readouterr().err


def test_labels_in_their_own_column_and_rows_without_an_answer(capsys):
    rows = [
        {"prompt": "p", "response_a": "x", "response_b": "longer", "label": "b"},
        {"prompt": [{"role": "user", "content": "q"}], "response_a": "longer", "response_b": "x", "label": 1},
        {"prompt": "r", "response_a": "x", "response_b": "longer"},
        {"prompt": "s", "response_a": "x", "response_b": "longer", "label": "tie"},
        {"prompt": "t", "response_a": "?", "response_b": "longer", "label": "a"},
    ]

    def respond(body, number):
        return error(400) if "?" in shown(body) else longer_wins(body, number)

    with serving(respond) as endpoint:
        assert run(endpoint, written("pairs.jsonl", rows), "--output", "out.jsonl", "--order", "given") == 0
    assert "0.500, 95 % interval" in (printed := capsys.readouterr().out) and "2 labels" in printed
    labelled = [json.loads(line)["preference"] for line in Path("out.jsonl").read_text().splitlines()]
    assert labelled == [pytest.approx(p) for p in (0.1, 0.9, 0.1, 0.1)] + [None]


def test_a_judge_that_likes_a_place_does_not_look_right_on_chosen_and_rejected(capsys):
    rows = [{"prompt": f"p{i}", "chosen": "one", "rejected": "two"} for i in range(40)]
    with serving(lambda body, number: says("A", 0.8)) as endpoint:
        assert run(endpoint, written("pairs.jsonl", rows), "--order", "given", "--output", "out.jsonl") == 0
    preferences = [json.loads(line)["preference"] for line in Path("out.jsonl").read_text().splitlines()]
    assert 8 < sum(p > 0.5 for p in preferences) < 32
    assert "0.800 (fair: 0.5)" in capsys.readouterr().out


def test_a_judge_that_stops_is_an_error_in_one_line(capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda body, number: error(401, f"bad key {KEY}")) as endpoint:
        assert run(endpoint, written("pairs.jsonl", ROWS)) == 1
    shown_text = "".join(capsys.readouterr())
    assert "error: The endpoint refuses to judge" in shown_text and KEY not in shown_text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no pairs in it"),
        ([ROWS[0], {"prompt": "p", "chosen": "x"}], "pairs.jsonl:2: no `rejected`"),
        ([{"chosen": "x", "rejected": "y"}], "pairs.jsonl:1: no `prompt`"),
        ([[1]], "pairs.jsonl:1: wanted: an object"),
        ([{"prompt": 3, "chosen": "x", "rejected": "y"}], "`prompt` must be text or a list of messages"),
        ([{"prompt": "p", "chosen": None, "rejected": "y"}], "`chosen` must be text"),
        ([{"prompt": "p", "response_a": "x", "response_b": "y", "label": "c"}], "`label` is 'c'"),
        ([{"prompt": "p", "response_a": "x", "response_b": "y", "label": True}], "`label` is True"),
    ],
)
def test_wrong_files(rows, message, capsys):
    words = ["--model", "m", "--base-url", "http://localhost:1/v1"]
    assert main(["judge", written("pairs.jsonl", rows), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give --model"),
        (["--model", "m"], "no API key for https://api.openai.com/v1"),
        (["--model", "m", "--order", "given", "--inconsistent", "skip"], "needs both orders"),
        (["--model", "m", "--template", "nowhere"], "there is no file 'nowhere'"),
        (["--pairwise-model", "."], "is no model folder"),
        (["--pairwise-model", ".", "--votes", "3"], "--pairwise-model does not go with --votes"),
        (["--model", "m", "--pairwise-kwargs", "{batch_size: 2}"], "--pairwise-kwargs goes with --pairwise-model"),
        (["--pairwise-model", ".", "--pairwise-kwargs", "batch_size"], "is 'batch_size'; wanted: such as '{batch_size"),
        (["--model", "m", "--base-url", "http://localhost:1/v1", "--extra", "seed"], "--extra is 'seed'; wanted: such"),
        (["--model", "m", "--base-url", "http://localhost:1/v1", "--output", "no/where.jsonl"], "there is no folder"),
        (["--model", "m", "--base_url", "http://localhost:1/v1", "--output", "."], "--output: . is a folder"),
        (["--model", "m", "--base-url", "http://localhost:1/v1", "--rubric-file", "empty.txt"], "empty.txt is empty"),
    ],
)
def test_wrong_words(words, message, capsys):
    Path("empty.txt").write_text("\n")
    assert main(["judge", written("pairs.jsonl", ROWS), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_option_is_one_line_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["judge", "pairs.jsonl", "--modle", "m"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --modle m. Did you mean `model`? See: online-dpo judge --help\n"
    )


def test_fields_of_the_request(capsys):
    def vote(body, number):
        return says("A")

    with serving(vote) as endpoint:
        extra = "{seed: 7, max_tokens: null, max_completion_tokens: 50}"
        assert run(endpoint, written("pairs.jsonl", ROWS[:1]), "--extra", extra, "--no-logprobs") == 0
    assert [seen.body["seed"] for seen in endpoint.seen] == [7, 7]
    assert {name for seen in endpoint.seen for name in seen.body} == {
        "model",
        "messages",
        "temperature",
        "seed",
        "max_completion_tokens",
    }


def test_every_setting_of_a_judge_is_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["judge", "--help"])
    listed = capsys.readouterr().out
    options = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(JudgeSettings)}
    assert all(option in listed for option in options - {"--logprobs"}) and "--no-logprobs" in listed


def test_an_endpoint_that_is_away_is_named(capsys):
    words = ["--model", "m", "--base_url", "http://localhost:1/v1", "--attempts", "1", "--no_cache"]
    assert main(["judge", written("pairs.jsonl", ROWS[:2]), *words]) == 1
    assert "Last cause: no connection to http://localhost:1/v1: " in capsys.readouterr().err


def test_an_endpoint_that_is_something_else_is_named(capsys):
    with serving(lambda body, number: Answer(b"<html>hello</html>")) as endpoint:
        assert run(endpoint, written("pairs.jsonl", ROWS[:2]), "--attempts", "1") == 1
    assert f"no chat completion from {endpoint.url}, but '<html>hello</html>'" in capsys.readouterr().err
    assert main(["judge", "nowhere.jsonl", "--model", "m", "--base-url", "http://localhost:1/v1"]) == 2


def test_a_folder_with_pairrm_judges_a_file(home, capsys):
    folder = pairrm_folder(home / "house")
    rows = [{"prompt": "w1", "response_a": "w2 w3", "response_b": "w4", "label": "a"}, {**ROWS[0], "label": None}]
    words = [written("pairs.jsonl", rows), "--pairwise-model", str(folder), "--output", "out.jsonl"]
    assert main(["judge", *words, "--pairwise-kwargs", "{max_tokens: 14, batch_size: 1}"]) == 0
    printed = capsys.readouterr().out
    assert "Judge house" in printed and "2, of which 1 have a preference" in printed
    both = [pairrm_log_odds(folder, "w1", *texts) for texts in (("w2 w3", "w4"), ("w4", "w2 w3"))]
    given, turned = torch.tensor(both).sigmoid().tolist()
    labelled = [json.loads(line)["preference"] for line in Path("out.jsonl").read_text().splitlines()]
    assert labelled == [pytest.approx((given + 1 - turned) / 2, abs=1e-6), None]
    assert main(["judge", *words, "--pairwise-kwargs", "{template: x}"]) == 2
    assert "--pairwise-model: A PairRM as judge takes no `template`" in capsys.readouterr().err


def test_arguments_are_checked_before_heavy_imports(home):
    program = (
        "import sys; from online_dpo.cli.main import main; code = main(['judge', 'nowhere.jsonl', '--model', 'm']);"
        "heavy = {'torch', 'transformers', 'openai'} & sys.modules.keys(); sys.exit(code if not heavy else 9)"
    )
    assert run_python("-c", program).returncode == 2
