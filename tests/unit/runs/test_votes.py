"""Votes of people: lines that several processes append, questions, agreement, and the file for `online-dpo judge`."""

import json
import multiprocessing

import pytest

from online_dpo.cli.judging.pairs_file import read_pairs
from online_dpo.runs.agreement import Agreement, agreements
from online_dpo.runs.layout import QUESTIONS, VOTES
from online_dpo.runs.questions import ask, asked, questions_of, waiting
from online_dpo.runs.reading import read_lines
from online_dpo.runs.shared_lines import FollowedLines, append_rows
from online_dpo.runs.votes import Vote, add_vote, question_id, vote_of, votes_as_pairs, votes_of


def vote(choice="first", prompt="P", first="a", second="b", **facts):
    return Vote(prompt, first, second, choice, **{"time": 1.0, **facts})


def append_many(path, writer):
    for number in range(50):
        append_rows(path, [{"writer": writer, "number": number, "text": "x" * 5000}])


def test_lines_of_several_processes_stay_whole(tmp_path):
    path = tmp_path / VOTES
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(path, writer)) for writer in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    rows = read_lines(path).rows
    assert sorted((row["writer"], row["number"]) for row in rows) == [(w, n) for w in range(3) for n in range(50)]


def test_what_a_killed_writer_left_is_a_line_of_its_own_that_nobody_reads(tmp_path):
    path = tmp_path / VOTES
    path.write_bytes(b'{"a": 1}\n{"b": ')
    append_rows(path, [{"c": 3}])
    assert read_lines(path).rows == [{"a": 1}, {"c": 3}]


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "secret").write_text("s")
    (tmp_path / VOTES).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        append_rows(tmp_path / VOTES, [{}])
    assert (tmp_path / "secret").read_text() == "s"


def test_a_file_is_read_further_and_from_its_start_where_it_became_shorter(tmp_path):
    path = tmp_path / VOTES
    lines = FollowedLines(path)
    assert lines.further() == []
    append_rows(path, [{"a": 1}])
    assert lines.further() == [{"a": 1}] and lines.further() == []
    path.write_text("{")
    assert lines.further() == []
    path.write_text('{"b": 2}\n')
    assert lines.further() == [{"b": 2}]


def test_a_question_is_the_same_in_both_orders_and_without_empty_keys_of_messages():
    messages = [{"role": "user", "content": "Hi", "name": None}]
    assert question_id(messages, "a", "b") == question_id([{"content": "Hi", "role": "user"}], "b", "a")
    assert question_id("P", "a", "b") != question_id("P", "a", "c") != question_id("Q", "a", "c")


def test_orders_are_shuffled_by_seed_and_question_and_always_the_same():
    shown = [asked(f"P{n}", "a", "b", 0, 0.0, 1.0).first for n in range(200)]
    assert shown == [asked(f"P{n}", "b", "a", 0, 5.0, 9.0).first for n in range(200)]
    assert 70 < shown.count("a") < 130
    assert shown != [asked(f"P{n}", "a", "b", 1, 0.0, 1.0).first for n in range(200)]


def test_a_vote_is_read_as_it_was_written(tmp_path):
    for given in (
        vote(),
        vote("tie", [{"role": "user", "content": "Hi"}], seconds=2.5, group="3-0-1-0", completions=(2, 0)),
    ):
        add_vote(tmp_path, given)
        assert votes_of(tmp_path)[given.question] == given
    assert json.loads((tmp_path / VOTES).read_text().splitlines()[0])["id"] == question_id("P", "a", "b")


@pytest.mark.parametrize("change", [{"choice": "third"}, {"first": None}, {"prompt": 3}])
def test_a_line_that_is_no_vote_is_left_out(change):
    assert vote_of(vote().as_json() | change) is None


def test_the_last_vote_counts_but_a_skip_takes_nothing_back(tmp_path):
    for choice in ("first", "second", "skip"):
        add_vote(tmp_path, vote(choice))
    add_vote(tmp_path, vote("skip", "Q"))
    votes = votes_of(tmp_path)
    assert votes[question_id("P", "a", "b")].choice == "second"
    assert votes[question_id("Q", "a", "b")].choice == "skip"


def test_the_probability_of_a_text():
    assert [vote("second").probability(text) for text in "ab"] == [0.0, 1.0]
    assert vote("tie").probability("a") == 0.5 and vote("skip").probability("a") is None


def test_questions_wait_until_their_time_ends_or_a_vote_comes(tmp_path):
    first, second = (asked(prompt, "a", "b", 0, 10.0, until) for prompt, until in (("P", 100.0), ("Q", 50.0)))
    ask(tmp_path, [first, second])
    questions = questions_of(tmp_path).values()
    assert waiting(questions, {}, 20.0) == [second, first]
    assert waiting(questions, {}, 60.0) == [first] and waiting(questions, {}, 100.0) == []
    add_vote(tmp_path, vote("tie", "P", "b", "a"))
    assert waiting(questions, votes_of(tmp_path), 20.0) == [second]
    (tmp_path / QUESTIONS).open("a").write('{"prompt": 3}\n')
    assert len(questions_of(tmp_path)) == 2


def test_votes_become_pairs_that_online_dpo_judge_reads(tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    add_vote(tmp_path, vote("second", group="3-0-1-0", completions=(0, 1)))
    add_vote(tmp_path, vote("tie", messages))
    add_vote(tmp_path, vote("skip", "Q"))
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in votes_as_pairs(tmp_path)))
    pairs = read_pairs(file, None)
    assert [(pair.prompt, pair.first, pair.second, pair.label, pair.ordered) for pair in pairs] == [
        ("P", "a", "b", 0.0, True),
        (messages, "a", "b", None, True),
    ]
    assert pairs[0].row["group"] == "3-0-1-0"


def group(first_reward, second_reward, **facts):
    texts = (("a", first_reward, 1.0), ("b", second_reward, 0.0))
    return {
        "completions": [{"text": t, "rewards": {"helpful": r, "short": s}, "score": r and r + s} for t, r, s in texts],
        **facts,
    }


def test_every_source_is_compared_with_the_person():
    groups = {
        "agrees": group(2.0, 1.0, pairs=[{"chosen": 0, "rejected": 1}]),
        "disagrees": group(0.0, 3.0, comparisons=[{"first": 1, "second": 0, "probability": 0.9}]),
        "missing": group(None, 1.0, pairs=[{"chosen": 1, "rejected": 0}]),
        "even": group(1.0, 1.0, comparisons=[{"first": 0, "second": 1, "probability": 0.5}]),
        "gone": None,
    }
    votes = [vote(prompt=name, group=name, completions=(0, 1)) for name in groups]
    votes += [vote("second", first="b", second="a", prompt="turned", group="agrees", completions=(1, 0))]
    votes += [vote("tie", prompt="tie", group="agrees", completions=(0, 1))]
    votes += [vote(prompt="other text", first="x", group="agrees", completions=(0, 1)), vote(prompt="of a trainer")]
    found = {one.name: one for one in agreements(votes, lambda vote: groups.get(vote.group))}
    assert found["helpful"] == Agreement("helpful", "reward", agreed=2, compared=3, undecided=2)
    assert found["short"] == Agreement("short", "reward", agreed=5, compared=5, undecided=0)
    assert found["score"] == Agreement("score", "score", agreed=3, compared=4, undecided=1)
    assert found["judge"] == Agreement("judge", "judge", agreed=0, compared=1, undecided=1)
    assert found["label"] == Agreement("label", "label", agreed=2, compared=3, undecided=0)
    low, high = found["helpful"].interval
    assert (round(low, 3), round(high, 3)) == (0.208, 0.939)  # Wilson's interval of 2 in 3


def test_numbers_of_a_vote_that_no_float_holds_are_left_out():
    row = {"prompt": "p", "first": "a", "second": "b", "choice": "first", "time": float("nan"), "seconds": 10**400}
    vote = vote_of(row)
    assert vote is not None and (vote.time, vote.seconds) == (0.0, None)
