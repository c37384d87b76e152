"""`Ledger`, built alone: what stages said of the groups of a step becomes a record of each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from online_dpo.packing.pack import pack_pairs, stand_in
from online_dpo.training.ledger import Ledger, Place
from online_dpo.training.objective_step import PairLosses
from online_dpo.types import (
    Comparison,
    Completion,
    Feedback,
    Group,
    Notes,
    Pair,
    Pairing,
    Preference,
    Prompt,
    Question,
    Round,
    RowLogprobs,
    Scores,
    Verdicts,
)
from support import tiny

LONG, SHORT = (5, 6, 7, tiny.EOS), (8, tiny.EOS)


def group(row: int = 0, *completions: tuple[int, ...], **fields: Any) -> Group:
    prompt = Prompt(f"prompt {row}", (4, 5), row, **fields)
    texts = (tiny.tokenizer().decode(ids, skip_special_tokens=True) for ids in completions)
    answers = [
        Completion(ids, (-0.5,) * len(ids), "stop", 3, text) for ids, text in zip(completions, texts, strict=True)
    ]
    return Group(prompt, tuple(answers))


def ledger(**options: Any) -> Ledger:
    made = Ledger(tiny.tokenizer(), **{"place": Place(rank=1, ranks=2), "seed": 42, **options})
    made.on = True
    return made


def losses(rows: Any, policy: float, reference: float | None, loss: float = 0.7, beta: float = 0.5) -> PairLosses:
    """Of a pass in which each token has these log-probabilities, times its number among all."""

    def logprobs(each: float) -> RowLogprobs:
        token_logps_M = each * torch.arange(1, 1 + int(rows.length_S.sum()))
        sums = torch.stack([part.sum() for part in token_logps_M.split(rows.length_S.tolist())])
        return RowLogprobs(token_logps_M.requires_grad_(), torch.zeros_like(token_logps_M), sums)

    loss_N = torch.full((len(rows.chosen_N),), loss, requires_grad=True)
    return PairLosses(loss_N.sum(), loss_N, logprobs(policy), None if reference is None else logprobs(reference), beta)


def rows_of(made: Ledger, step: int = 8, **options: Any) -> list[dict[str, Any]]:
    return [record.as_json() for record in made.take(step, **options)]


def scored(groups: list[Group], values: list[list[float | None]], pairing: Pairing, **fields: Any) -> Feedback:
    return Feedback(groups, Scores(values, {"f": values}, weights={"f": 1.0}), {}, pairing=pairing, **fields)


def test_the_whole_row_of_a_group():
    one = group(17, SHORT, LONG, columns={"label": "red"}, cut=True)
    scores = Scores(
        values=[[1.0, -3.0]],
        by_scorer={"f": [[1.0, 2.0]], "g": [[None, None]]},
        normalized=[[0.5, -2.5]],
        weights={"f": 0.5, "g": 2.0},
        relative={"f": [[-1.0, 1.0]]},
        penalties=[[{}, {"length": 4.0}]],
    )
    pair = Pair(one, 0, 1, 1.0, -3.0, probability=0.9, weight=4.0)
    pairing = Pairing([pair], left_out=Counter(margin=2), left_out_of={0: Counter(margin=2)})
    made = ledger()
    made.begin_step(Feedback([one], scores, {}, notes=Notes(columns={"answer": ["5", "7"]}), pairing=pairing))
    rows = pack_pairs([pair], shared=True)
    made.saw_pass(rows, losses(rows, policy=-0.1, reference=-0.2))
    [row] = rows_of(made)
    assert row == {
        "step": 8,
        "rank": 1,
        "index": 0,
        "round": 0,
        "prompt": "prompt 17",
        "prompt_row": 17,
        "prompt_length": 2,
        "prompt_cut": True,
        "columns": {"label": "red"},
        "completions": [
            {
                "text": "w4",
                "length": 2,
                "finish": "stop",
                "author": "policy",
                "version": 3,
                "rewards": {"f": 1.0, "g": None},
                "weighted": {"f": 0.5, "g": None},
                "normalized": {"f": -1.0},
                "score": 1.0,
                "ranking": 0.5,
                "sampled_logp": -1.0,
                "tokens": [" w4", " <eos>"],
                "log_ratios": [0.1, 0.2],
                "logp": -0.3,
                "ref_logp": -0.6,
            },
            {
                "text": "w1 w2 w3",
                "length": 4,
                "finish": "stop",
                "author": "policy",
                "version": 3,
                "rewards": {"f": 2.0, "g": None},
                "weighted": {"f": 1.0, "g": None},
                "normalized": {"f": 1.0},
                "penalties": {"length": 4.0},
                "score": -3.0,
                "ranking": -2.5,
                "sampled_logp": -2.0,
                "tokens": [" w1", " w2", " w3", " <eos>"],
                "log_ratios": [0.3, 0.4, 0.5, 0.6],
                "logp": -1.8,
                "ref_logp": -3.6,
            },
        ],
        "pairs": [
            {
                "chosen": 0,
                "rejected": 1,
                "probability": 0.9,
                "margin": 4.0,
                "weight": 4.0,
                "loss": 0.7,
                "implied": pytest.approx(0.5 * (0.3 - 1.8)),
            }
        ],
        "left_out": {"margin": 2},
        "notes": {"answer": ["5", "7"]},
    }
    assert made.take(9) == []


def test_what_a_later_pass_says_of_a_pair_counts_and_stand_ins_say_nothing():
    groups = [group(row, SHORT, LONG) for row in range(3)]
    pairs = [Pair(one, 0, 1, 1.0, 0.0) for one in groups]
    made = ledger()
    made.begin_step(scored(groups, [[1.0, 0.0]] * 3, Pairing(pairs)))
    whole, halves = pack_pairs(pairs, shared=True), [pack_pairs(pairs[1:], True), pack_pairs(pairs[:1], False)]
    made.saw_pass(whole, losses(whole, -9.0, -1.0, loss=99.0))  # it ran out of memory afterwards
    for half in halves:
        made.saw_pass(half, losses(half, -0.1, -0.2))
    made.saw_pass(stand_in(True), losses(stand_in(True), -5.0, -5.0))
    rows = rows_of(made)
    assert [row["pairs"][0]["loss"] for row in rows] == [0.7] * 3
    assert [row["completions"][0]["log_ratios"] for row in rows] == [[0.1, 0.2], [0.1, 0.2], [0.7, 0.8]]


@pytest.mark.parametrize(("shared", "capacity"), [(True, 0), (True, 64), (False, 0)])
def test_completions_of_several_pairs_in_every_layout(shared, capacity):
    groups = [group(row, SHORT, LONG, (9, tiny.EOS)) for row in range(4)]
    pairs = [Pair(one, *which, 2.0, 1.0) for one in groups for which in ((2, 0), (2, 1), (0, 1))]
    made = ledger()
    made.begin_step(scored(groups, [[1.0, 0.0, 2.0]] * 4, Pairing(pairs)))
    rows = pack_pairs(pairs, shared, capacity)
    made.saw_pass(rows, losses(rows, -0.1, -0.2))
    start = 0
    for row in rows_of(made):  # the order in which they stand in a row: that of their first pair
        for k in (2, 0, 1):
            length = row["completions"][k]["length"]
            expected = [0.1 * number for number in range(start + 1, start + length + 1)]
            assert row["completions"][k]["log_ratios"] == pytest.approx(expected)
            start += length


def test_without_a_reference_nothing_is_relative_to_it():
    one = group(0, SHORT, LONG)
    pair, made = Pair(one, 0, 1, 1.0, 0.0), ledger()
    made.begin_step(scored([one], [[1.0, 0.0]], Pairing([pair])))
    rows = pack_pairs([pair], True)
    made.saw_pass(rows, losses(rows, -0.1, None))
    [row] = rows_of(made)
    assert row["completions"][0]["logp"] == -0.3 and row["completions"][0]["tokens"] == [" w4", " <eos>"]
    assert not {"log_ratios", "ref_logp"} & set(row["completions"][0]) and "implied" not in row["pairs"][0]


def test_a_step_that_ended_before_its_passes_has_rows_without_their_figures():
    one = group(0, SHORT, LONG)
    made = ledger(skipped=lambda: True)
    made.begin_step(scored([one], [[1.0, 0.0]], Pairing([Pair(one, 0, 1, 1.0, 0.0)])))
    [row] = rows_of(made)
    assert row["pairs"] == [{"chosen": 0, "rejected": 1, "probability": 1.0, "margin": 1.0, "weight": 1.0}]
    assert row["skipped"] is True and row["completions"][0]["tokens"] and "logp" not in row["completions"][0]


def test_rounds_of_a_prompt_that_was_answered_again():
    first = [group(row, SHORT, SHORT) for row in (10, 11, 12)]
    second = [group(row, LONG, LONG) for row in (10, 12)]
    third = [group(12, LONG, SHORT)]
    tied: list[list[float | None]] = [[1.0, 1.0]]
    pair, other = Pair(first[1], 1, 0, 2.0, 1.0), Pair(third[0], 0, 1, 4.0, 3.0)
    pairing = Pairing([pair, other], Counter(tie=1), reasons={0: "tie"})
    values = Scores([[1.0, 1.0], [1.0, 2.0], [None, 1.0]], {"f": [[1.0, 1.0], [1.0, 2.0], [None, 1.0]]})
    both = Scores(tied * 2, {"f": tied * 2})
    rounds = (
        Round([0, 2], second, both, ["tie", "missing_score"], Notes(columns={"n": [*"abcd"]})),
        Round([2], third, Scores([[4.0, 3.0]], {"f": [[4.0, 3.0]]}), ["tie"]),
    )
    notes = Notes(columns={"n": [*"uvwxyz"]})
    made = ledger()
    made.begin_step(Feedback(first, values, {}, rounds, notes, pairing))
    rows = rows_of(made)
    said = [(row["index"], row["round"], row.get("reason"), row.get("resampled_for")) for row in rows]
    assert said == [
        (0, 0, "resampled", "tie"),
        (0, 1, "tie", None),
        (1, 0, None, None),
        (2, 0, "resampled", "missing_score"),
        (2, 1, "resampled", "tie"),
        (2, 2, None, None),
    ]
    assert [row.get("notes", {}).get("n") for row in rows] == [[*"uv"], [*"ab"], [*"wx"], [*"yz"], [*"cd"], None]
    assert [len(row.get("pairs", [])) for row in rows] == [0, 0, 1, 0, 0, 1]
    assert [row["completions"][0]["score"] for row in rows] == [1.0, 1.0, 1.0, None, 1.0, 4.0]


def test_a_judge_s_comparisons_with_places_in_the_group():
    one = group(0, SHORT, LONG, (9, tiny.EOS))
    questions = (
        Question(False, 0.9, "A", 0.5, 100, 0.01),
        Question(True, None, failure="no reply"),
        Question(True, 0.3, "B", cached=True),
    )
    compared = Comparison(2, 0, 0.8, questions)
    verdicts = Verdicts([Preference(2, 0, 0.8)], 2, 1, None, [(compared, Comparison(0, 1, None))], [[{}, {}, {}]])
    made = ledger()
    made.begin_step(Feedback([one], verdicts, {}, pairing=Pairing([Pair(one, 2, 0, probability=0.8)])))
    [row] = rows_of(made)
    assert row["comparisons"] == [
        {
            "first": 2,
            "second": 0,
            "probability": 0.8,
            "orders": [
                {"shown": [2, 0], "probability": 0.9, "words": "A", "seconds": 0.5, "tokens": 100, "cost": 0.01},
                {"shown": [0, 2], "probability": None, "failure": "no reply"},
                {"shown": [0, 2], "probability": 0.3, "words": "B", "cached": True},
            ],
        },
        {"first": 0, "second": 1, "probability": None},
    ]
    assert "score" not in row["completions"][0] and "rewards" not in row["completions"][0]


def test_feedback_of_an_older_checkpoint_has_less_to_say():
    one, again = group(0, SHORT, SHORT), group(0, LONG, SHORT)
    before = Scores([[1.0, 1.0]], {"f": [[1.0, 1.0]]})
    pairing = Pairing([Pair(again, 0, 1, 2.0, 1.0)])
    made = ledger()
    made.begin_step(
        Feedback([one], before, {}, (Round([0], [again], Scores([[2.0, 1.0]], {"f": [[2.0, 1.0]]})),), None, pairing)
    )
    rows = rows_of(made)
    assert [(row.get("reason"), "resampled_for" in row) for row in rows] == [("resampled", False), (None, False)]
    assert rows[1]["completions"][0]["rewards"] == {"f": 2.0} and "weighted" not in rows[1]["completions"][0]
    made.begin_step(Feedback([one], Verdicts([None], 1, 1), {}, pairing=Pairing([], Counter(no_answer=1))))
    [row] = rows_of(made)
    assert row["reason"] == "no_answer" and "comparisons" not in row


def test_off_nothing_is_kept():
    one = group(0, SHORT, LONG)
    pair, made = Pair(one, 0, 1, 1.0, 0.0), ledger()
    made.on = False
    made.begin_step(scored([one], [[1.0, 0.0]], Pairing([pair])))
    rows = pack_pairs([pair], True)
    made.saw_pass(rows, losses(rows, -0.1, None))
    assert made.take(1) == []


def test_so_many_groups_over_all_ranks_with_all_their_rounds():
    groups = [group(row, SHORT, LONG) for row in range(6)]
    places: dict[int, list[int]] = {}
    for rank in (0, 1):
        made = ledger(place=Place(rank, 2))
        for step in range(1, 9):
            made.begin_step(scored(groups, [[1.0, 1.0]] * 6, Pairing([], Counter(tie=6))))
            rows = rows_of(made, step, most=3)
            places.setdefault(step, []).append(len(rows))
            assert {row["rank"] for row in rows} == {rank}
    assert all(sorted(found) == [1, 2] for found in places.values())
    assert {tuple(found) for found in places.values()} == {(1, 2), (2, 1)}


def test_a_further_run_of_the_same_trainer_has_records_of_its_own():
    made = ledger()
    for row in (1, 2):
        one = group(row, SHORT, LONG)
        made.begin_step(scored([one], [[1.0, 1.0]], Pairing(dropped=Counter(tie=1), reasons={0: "tie"})))
        assert [record.prompt_row for record in made.of_step(10)] == [row]
        assert [record.prompt_row for record in made.of_step(10)] == [row]
