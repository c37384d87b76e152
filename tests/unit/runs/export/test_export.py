"""`online-dpo export`: the pairs of a record as a preference dataset, and what is left out of it."""

import json

import pyarrow.parquet as pq
import pytest
from datasets import Features, Value, load_dataset

from online_dpo.cli.judging.pairs_file import read_pairs
from online_dpo.cli.main import main
from online_dpo.runs import frames
from online_dpo.runs.layout import CompletionsFile
from online_dpo.runs.votes import Vote, add_vote
from support import records
from support.records import completion, group

CHAT = [{"role": "user", "content": "Name a colour."}]


def answers(*scores):
    return [completion(f"answer {n}", score) for n, score in enumerate(scores)]


@pytest.fixture
def folder(tmp_path):
    """Five steps: a pair, two pairs of one group, a tie, a pair of small margin, a pair of the second rank."""
    groups = [
        group(1, answers(3.0, 1.0, 2.0)),
        group(2, answers(4.0, 1.0, 2.5), [(0, 1), (0, 2)]),
        group(3, answers(1.0, 1.0), [], reason="tie"),
        group(4, answers(0.25, 0.5), [(1, 0)]),
        group(2, answers(5.0, -1.0), rank=1, prompt="Prompt two of rank 1?", prompt_row=9),
    ]
    return records.write(tmp_path / "run", groups, [{"step": 1, "loss": 0.69}])


def export(*words):
    return main(["export", *map(str, words)])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.smoke
def test_pairs_come_by_step_with_their_scores_and_names(folder, tmp_path, capsys):
    assert export(folder, "--to", tmp_path / "pairs.jsonl") == 0
    rows = lines(tmp_path / "pairs.jsonl")
    assert [row["id"] for row in rows] == [
        *("1-0-0-0-0-1", "2-0-0-0-0-1", "2-0-0-0-0-2", "2-1-0-0-0-1", "4-0-0-0-1-0"),
    ]
    assert rows[0] == {
        **{"prompt": "Prompt 1?", "chosen": "answer 0", "rejected": "answer 1"},
        **{"score_chosen": 3.0, "score_rejected": 1.0, "score_chosen_words": 3.0, "score_rejected_words": 1.0},
        **{"margin": 2.0, "probability": 1.0, "finish_chosen": "stop", "finish_rejected": "stop"},
        **{"step": 1, "row": 1, "id": "1-0-0-0-0-1"},
    }
    assert rows[3]["prompt"] == "Prompt two of rank 1?" and rows[3]["row"] == 9
    printed = capsys.readouterr().out
    assert f"5 pairs of 5 groups written to {tmp_path / 'pairs.jsonl'}" in printed
    assert "left out: 1 groups without a pair: tie (all scores are equal" in printed


def test_parquet_has_the_same_rows(folder, tmp_path):
    assert export(folder, "--to", tmp_path / "pairs.jsonl") == 0 == export(folder, "--to", tmp_path / "pairs.parquet")
    assert pq.read_table(tmp_path / "pairs.parquet").to_pylist() == lines(tmp_path / "pairs.jsonl")
    loaded = load_dataset("parquet", data_files=str(tmp_path / "pairs.parquet"), split="train", cache_dir=str(tmp_path))
    assert loaded.features["margin"] == Value("float64") and isinstance(loaded.features, Features)


def test_conversations_give_conversations(tmp_path):
    system = [{"role": "system", "content": "Be brief."}, *CHAT]
    groups = [group(1, answers(2.0, 1.0), prompt=CHAT), group(2, answers(2.0, 1.0), prompt=system)]
    folder = records.write(tmp_path / "run", groups)
    assert export(folder, "--to", tmp_path / "pairs.jsonl") == 0 == export(folder, "--to", tmp_path / "pairs.parquet")
    rows = lines(tmp_path / "pairs.jsonl")
    assert rows == pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == [CHAT, system]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "answer 0"}]
    assert rows[0]["rejected"] == [{"role": "assistant", "content": "answer 1"}]


def test_steps_and_margins_select(folder, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    for words, steps in (
        (["--steps", "2:4"], [2, 2, 2, 4]),
        (["--steps", "2:"], [2, 2, 2, 4]),
        (["--steps", ":1"], [1]),
        (["--steps", "4"], [4]),
        (["--min-margin", "2"], [1, 2, 2]),
        (["--min_margin", "2", "--steps", "2:"], [2, 2]),
    ):
        assert export(folder, "--to", file, "--overwrite", *words) == 0
        assert [row["step"] for row in lines(file)] == steps, words
    printed = capsys.readouterr().out
    assert "left out: 2 pairs with a margin below 2" in printed and "left out: 1 groups of other steps" in printed


def test_all_completions_are_rows_too_with_every_score(folder, tmp_path):
    assert export(folder, "--to", tmp_path / "all.jsonl", "--all-completions") == 0
    rows = lines(tmp_path / "all.jsonl")
    assert len(rows) == 3 + 3 + 2 + 2 + 2 and rows[1] == {
        **{"prompt": "Prompt 1?", "completion": "answer 1", "score": 1.0, "score_words": 1.0, "length": 2},
        **{"finish": "stop", "author": "policy", "version": 0, "step": 1, "row": 1, "id": "1-0-0-0-1"},
    }
    assert len({row["id"] for row in rows}) == len(rows)


def test_columns_are_the_same_in_every_row_and_empty_ones_are_left_out(tmp_path):
    """A judge gives no scores, and a scorer may give none for a row."""
    judged = records.write(tmp_path / "judged", [group(1, answers(None, None))])
    assert export(judged, "--to", tmp_path / "judged.jsonl") == 0
    assert not {"margin", "score_chosen", "score_rejected"} & set(lines(tmp_path / "judged.jsonl")[0])
    scored = records.write(tmp_path / "scored", [group(1, answers(2.0, 1.0))])
    assert export(judged, scored, "--to", tmp_path / "both.jsonl") == 0
    first, second = lines(tmp_path / "both.jsonl")
    assert list(first) == list(second) and (first["margin"], second["margin"]) == (None, 1.0)
    assert (first["id"], second["id"]) == ("judged/1-0-0-0-0-1", "scored/1-0-0-0-0-1")
    assert (first["run"], second["run"]) == ("judged", "scored")


def test_tools_of_a_prompt_go_along(tmp_path):
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    groups = [
        group(1, answers(2.0, 1.0), prompt=CHAT, columns={"tools": tools}),
        group(2, answers(2.0, 1.0), prompt=CHAT),
    ]
    assert export(records.write(tmp_path / "run", groups), "--to", tmp_path / "pairs.jsonl") == 0
    first, second = lines(tmp_path / "pairs.jsonl")
    assert json.loads(first["tools"]) == tools and second["tools"] is None


def test_what_is_torn_damaged_or_strange_is_told(folder, tmp_path, capsys):
    file = folder / CompletionsFile(0, 0).name
    damaged = bytearray(frames.encode([group(5, answers(2.0, 1.0))]))
    damaged[-2] ^= 1
    strange = frames.encode([{"step": "six"}, {"step": 6, "rank": 0, "pairs": [{"chosen": 7}], "completions": []}])
    file.write_bytes(file.read_bytes() + damaged + strange + strange[:-5])
    assert export(folder, "--to", tmp_path / "pairs.jsonl") == 0
    printed = capsys.readouterr().out
    assert "left out: 1 steps that are damaged" in printed and "left out: 2 groups that cannot be read" in printed
    assert f"not there yet: {len(strange) - 5} bytes" in printed
    assert len(lines(tmp_path / "pairs.jsonl")) == 5


def test_votes_are_read_by_the_judge_command(folder, tmp_path, capsys):
    for n, choice in enumerate(["first", "second", "tie", "skip"]):
        add_vote(folder, Vote(f"Prompt {n}?", "Red.", "Blue.", choice, time=1.0, group="1-0-0-0", completions=(0, 1)))
    assert export(folder, "--to", tmp_path / "votes.jsonl", "--votes") == 0
    printed = capsys.readouterr().out
    assert "3 votes written to" in printed and "left out: 1 questions that were skipped" in printed
    pairs = read_pairs(tmp_path / "votes.jsonl", None)
    assert [(pair.prompt, pair.label) for pair in pairs] == [
        ("Prompt 0?", 1.0),
        ("Prompt 1?", 0.0),
        ("Prompt 2?", None),
    ]


def test_hostile_text_stays_what_it_is(tmp_path):
    text = "</script>\n\u2028\u202e\x00 \U0001f600 {{7*7}}"
    folder = records.write(tmp_path / "run", [group(1, [completion(text, 2.0), completion("", 1.0)], prompt=text)])
    assert export(folder, "--to", tmp_path / "pairs.jsonl") == 0 == export(folder, "--to", tmp_path / "pairs.parquet")
    [row] = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    [line] = (tmp_path / "pairs.jsonl").read_text().split("\n")[:-1]
    assert json.loads(line) == row and row["prompt"] == text == row["chosen"] and row["rejected"] == ""


def test_a_file_is_whole_or_as_it_was(folder, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("mine\n")
    assert export(folder, "--to", file) == 2 and "exists. Give another name, or --overwrite" in capsys.readouterr().err
    assert export(folder, "--to", file, "--overwrite", "--steps", "77:") == 2
    printed = capsys.readouterr().err
    assert "error: there is nothing to export." in printed and "left out: 5 groups of other steps" in printed
    assert file.read_text() == "mine\n" and sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl", "run"]
    assert export(folder, "--to", file, "--overwrite") == 0 and len(lines(file)) == 5


def test_wrong_input_is_one_clear_line(folder, tmp_path, capsys):
    records.write(tmp_path / "none", metrics=[{"step": 1}])
    records.write(tmp_path / "chat", [group(1, answers(2.0, 1.0), prompt=CHAT)])
    to = ["--to", tmp_path / "pairs.jsonl"]
    for words, expected in (
        ([tmp_path / "nowhere", *to], "there is no such folder"),
        ([tmp_path, *to], f"Run folders in it: {tmp_path / 'none'}, {tmp_path / 'run'}."),
        ([folder / "metrics.jsonl", *to], "this is a file. Give the output folder of a run"),
        ([tmp_path / "none", *to], "has written no completions"),
        ([folder, "--to", tmp_path / "pairs.csv"], "another ending than .jsonl or .parquet"),
        ([folder, "--to", tmp_path / "away" / "pairs.jsonl"], "there is no folder"),
        ([folder, "--to", folder / "metrics.jsonl", "--overwrite"], "belongs to the record of the run"),
        ([folder, *to, "--steps", "5:2"], "the last step is before the first"),
        ([folder, *to, "--steps", "a"], "wanted: such as 100:200"),
        ([folder, *to, "--min-margin", "nan"], "--min-margin"),
        ([folder, *to, "--min-margin", "1", "--all-completions"], "does not go with --all-completions"),
        ([folder, *to, "--votes", "--steps", "1"], "goes with no other choice of rows"),
        ([folder, *to, "--votes"], "there is nothing to export"),
        ([folder, tmp_path / "chat", *to], "texts in run and conversations in chat"),
    ):
        assert export(*words) == 2, words
        printed = capsys.readouterr().err
        assert expected in printed and printed.startswith("error: ") and printed.count("\n") == 1, printed
    with pytest.raises(SystemExit):
        export(folder, "--output", tmp_path / "pairs.jsonl")
    assert "--to" in capsys.readouterr().err


def test_a_large_run_is_never_in_memory_whole(tmp_path):
    """2,000 groups of 100 kB each: 200 MB of text, in frames that compress well."""
    import tracemalloc

    text = "word " * 10_000
    groups = [group(step, [completion(text, 2.0), completion(text + "end", 1.0)]) for step in range(1, 201)]
    folder = records.write(tmp_path / "run", groups)
    del groups
    tracemalloc.start()
    assert export(folder, "--to", tmp_path / "pairs.jsonl") == 0
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_messages_that_parquet_cannot_hold_together_are_told(tmp_path, capsys):
    parts = [{"type": "text", "text": "Name a colour."}]
    mixed = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}], CHAT]
    groups = [group(step, answers(2.0, 1.0), prompt=prompt) for step, prompt in enumerate(mixed, 1)]
    run = records.write(tmp_path / "run", groups)
    assert export(run, "--to", tmp_path / "pairs.parquet") == 2
    assert "Export to a .jsonl file." in capsys.readouterr().err and not (tmp_path / "pairs.parquet").exists()
    assert export(run, "--to", tmp_path / "pairs.jsonl") == 0
