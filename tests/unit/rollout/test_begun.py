"""A step that was begun, in a checkpoint: what is said of its groups is the same after a way through the file."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import pytest

from online_dpo.checkpoints.codec import read_json, write_json
from online_dpo.errors import CheckpointError
from online_dpo.rollout.begun import BegunStep, Fetched, SampledRound, Samples, SavedStep, saved_step
from online_dpo.types import (
    Comparison,
    Feedback,
    Notes,
    Pair,
    Pairing,
    Preference,
    Question,
    Round,
    Scores,
    Verdicts,
)
from support import tiny

PROMPTS = tiny.prompts([3, 4])
GROUPS = [tiny.group(prompt, [[5, 1], [6, 1]]) for prompt in PROMPTS]
AGAIN = [tiny.group(PROMPTS[0], [[7, 1], [8, 1]])]
SCORES = Scores(
    [[1.0, 1.0], [2.0, None]],
    {"f": [[1.0, 1.0], [2.0, None]]},
    [[0.0, 0.0], [0.0, None]],
    {"f": 0.5},
    {"f": [[0.0, 0.0], [0.0, None]]},
    [[{}, {"length": 0.5}], [{"missing_eos": 1.0}, {}]],
)
QUESTIONS = (Question(False, 0.9, "A", 0.1, 12, 0.5), Question(True, None, failure="late"))


def begun(feedback: Feedback) -> BegunStep:
    rounds = [SampledRound([0, 1], feedback.groups, 0.5)]
    rounds += [SampledRound(one.places, one.groups, 0.5) for one in feedback.further]
    future: Future[Feedback] = Future()
    future.set_result(feedback)
    return BegunStep(
        4, Fetched(PROMPTS, 2, 1), Samples([replace(g, completions=()) for g in GROUPS], 0.0, rounds), future
    )


def through_a_file(feedback: Feedback, path) -> Feedback:
    write_json(path, saved_step(begun(feedback)))
    _, restored = read_json(path, SavedStep).restored(PROMPTS)
    assert restored is not None
    return restored


def test_scores_rounds_reasons_and_notes(tmp_path):
    newer = Scores([[4.0, 3.0]], {"f": [[4.0, 3.0]]}, [[1.0, -1.0]], {"f": 0.5}, {"f": [[1.0, -1.0]]}, [[{}, {}]])
    pairing = Pairing(
        [Pair(AGAIN[0], 0, 1, 4.0, 3.0)],
        Counter(missing_score=1),
        Counter(margin=2),
        {1: "missing_score"},
        {0: Counter(margin=2)},
    )
    again = Round([0], AGAIN, newer, ["tie"], Notes({"m": [1.0]}, {"n": ["a", "b"]}))
    feedback = Feedback(
        GROUPS, SCORES, {"rollout": 1.0, "scoring": 0.5}, (again,), Notes(columns={"n": [*"abcd"]}), pairing
    )
    assert through_a_file(feedback, tmp_path / "step.json") == feedback


def test_verdicts_with_what_was_asked(tmp_path):
    compared = [(Comparison(0, 1, 0.9, QUESTIONS),), (Comparison(1, 0, None),)]
    verdicts = Verdicts([Preference(0, 1, 0.9), None], 2, 1, SCORES, compared, SCORES.penalties)
    pairing = Pairing([Pair(GROUPS[0], 0, 1, probability=0.9)], Counter(no_answer=1), reasons={1: "no_answer"})
    feedback = Feedback(GROUPS, verdicts, {"rollout": 1.0, "scoring": 0.5}, pairing=pairing)
    assert through_a_file(feedback, tmp_path / "step.json") == feedback


@pytest.mark.parametrize(
    "said",
    [
        replace(SCORES, relative={"f": [[0.0]]}),
        replace(SCORES, penalties=[[{}], [{}]]),
        Verdicts([None, None], 0, 0, comparisons=[(Comparison(0, 2, 0.5),), ()]),
        Verdicts([None, None], 0, 0, comparisons=[()]),
        Verdicts([None, None], 0, 0, penalties=[[{}, {}]]),
    ],
)
def test_what_does_not_fit_the_groups_is_refused(tmp_path, said):
    feedback = Feedback(GROUPS, said, {"rollout": 1.0, "scoring": 0.5}, pairing=Pairing([], Counter(tie=2)))
    with pytest.raises(CheckpointError, match="What the checkpoint holds of step 4 is damaged"):
        through_a_file(feedback, tmp_path / "step.json")


def test_a_checkpoint_from_before_reasons_were_kept(tmp_path):
    feedback = Feedback(GROUPS, SCORES, {"rollout": 1.0, "scoring": 0.5}, pairing=Pairing([], Counter(tie=2)))
    path = tmp_path / "step.json"
    write_json(path, saved_step(begun(feedback)))
    text = path.read_text().replace(', "reasons": [null, null], "left_out_of": [{}, {}]', "")
    assert "reasons" not in text
    path.write_text(text)
    _, restored = read_json(path, SavedStep).restored(PROMPTS)
    assert restored == feedback
