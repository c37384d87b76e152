"""`judge: human`: questions in the folder, votes that another process appends, time limits, signals."""

import signal
import threading
import time

import pytest

from online_dpo.distributed.signals import StoppedBySignal, handling
from online_dpo.runs.questions import questions_of
from online_dpo.runs.votes import Vote, add_vote
from online_dpo.scoring.judge_registry import check_judge, judge, pairwise_scorer
from online_dpo.scoring.judges.human import HumanJudge
from online_dpo.scoring.judges.tournament import find_preferences
from online_dpo.scoring.protocols import WaitingScorer, is_fair
from online_dpo.types import Completion, Group, Prompt
from support import tiny
from support.busy import tries


def comparison(prompt, first, second):
    return Group(Prompt(prompt, (), row=0), tuple(Completion((), (), "stop", 0, text) for text in (first, second)))


def voting(folder, choose, number=1):
    """A thread that votes as soon as there are so many questions."""

    def vote():
        while len(questions := questions_of(folder)) < number:
            time.sleep(0.01)
        for question in questions.values():
            add_vote(folder, Vote(question.prompt, question.first, question.second, choose(question), time.time()))

    thread = threading.Thread(target=vote)
    thread.start()
    return thread


def prefers(text):
    return lambda question: "first" if question.first == text else "second"


def test_a_vote_reaches_the_comparison_whichever_answer_was_shown_first(tmp_path, caplog):
    human = HumanJudge(tmp_path, timeout=600.0)
    asked = [comparison(f"P{n}", "good", "bad") for n in range(8)] + [comparison("Q", "bad", "good")]
    voter = voting(tmp_path, prefers("good"), 9)
    assert human.prefer(asked) == [1.0] * 8 + [0.0]
    voter.join()
    assert {question.first for question in questions_of(tmp_path).values()} == {"good", "bad"}
    assert f"Waiting for a person's vote on 9 questions: online-dpo dashboard {tmp_path}" in caplog.text
    counts = human.drain().metrics()
    assert counts["judge/questions"] == counts["judge/votes"] == 9.0 and counts["judge/unanswered"] == 0.0
    assert 0 < counts["judge/position_bias"] < 1
    assert is_fair(human) and isinstance(human, WaitingScorer)


def test_votes_stand_in_what_is_told_of_a_comparison(tmp_path):
    add_vote(tmp_path, Vote("P", "b", "a", "second", time=1.0, seconds=3.5))
    add_vote(tmp_path, Vote("Q", "a", "b", "skip", time=1.0))
    human = HumanJudge(tmp_path, timeout=0.1)
    verdicts = find_preferences([comparison(p, "a", "b") for p in "PQR"], human)
    [[voted], [skipped], [missed]] = verdicts.comparisons
    assert (voted.first, voted.second, voted.probability) == (0, 1, 1.0)
    [question] = voted.questions
    assert question.probability == (0.0 if question.swapped else 1.0) and question.seconds == 3.5
    assert [one.questions[0].failure for one in (skipped, missed)] == ["it was skipped", "nobody voted in time"]
    assert skipped.probability is missed.probability is None


def test_what_was_voted_on_is_not_asked_again_and_equal_texts_never(tmp_path):
    add_vote(tmp_path, Vote("P", "b", "a", "second", time=1.0))
    add_vote(tmp_path, Vote("Q", "a", "b", "tie", time=1.0))
    add_vote(tmp_path, Vote("R", "a", "b", "skip", time=1.0))
    human = HumanJudge(tmp_path, timeout=0.1)
    assert human.prefer([comparison(p, "a", "b") for p in "PQR"] + [comparison("S", "a", "a")]) == [1.0, 0.5, None, 0.5]
    assert questions_of(tmp_path) == {}


def test_what_is_not_voted_on_in_time_has_no_answer(tmp_path):
    human = HumanJudge(tmp_path, timeout=0.6)
    add_vote(tmp_path, Vote("P", "a", "b", "first", time=1.0))
    started = time.monotonic()
    assert human.prefer([comparison("P", "a", "b"), comparison("Q", "a", "b")]) == [1.0, None]
    assert 0.5 < time.monotonic() - started < 60
    [question] = questions_of(tmp_path).values()
    assert question.prompt == "Q" and question.until == pytest.approx(time.time(), abs=60)


@tries(3)
def test_all_questions_of_an_assessment_share_the_time(tmp_path):
    human = HumanJudge(tmp_path, timeout=2.0)
    human.begin_assessment()
    assert human.prefer([comparison("P", "a", "b")]) == [None]
    started = time.monotonic()
    assert human.prefer([comparison("Q", "a", "b")]) == [None]
    assert time.monotonic() - started < 1.5


def test_half_a_surrogate_pair_in_an_answer_is_no_obstacle(tmp_path):
    human = HumanJudge(tmp_path, timeout=600.0)
    voter = voting(tmp_path, prefers("good ?"))
    assert human.prefer([comparison("P\ud83d", "bad", "good \ud83d")]) == [0.0]
    voter.join()


def test_a_conversation_is_asked_with_its_messages(tmp_path):
    human = HumanJudge(tmp_path, timeout=600.0)
    voter = voting(tmp_path, prefers("a"))
    assert human.prefer([comparison([{"role": "user", "content": "Hi", "name": None}], "a", "b")]) == [1.0]
    voter.join()
    [question] = questions_of(tmp_path).values()
    assert question.prompt == [{"role": "user", "content": "Hi"}]


def test_a_signal_ends_the_wait_and_a_repeated_question_takes_the_votes_that_stand(tmp_path):
    human = HumanJudge(tmp_path, timeout=600.0)
    asked = [comparison("P", "a", "b"), comparison("Q", "a", "b")]

    def one_vote_then_a_signal():
        while len(questions_of(tmp_path)) < 2:
            time.sleep(0.01)
        add_vote(tmp_path, Vote("P", "a", "b", "first", time=1.0))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with handling(lambda number: None):  # as the trainer's: the first signal only asks to stop
        threading.Thread(target=one_vote_then_a_signal).start()
        with pytest.raises(StoppedBySignal):
            human.prefer(asked)
    human.begin_assessment()
    voter = voting(tmp_path, prefers("b"), 2)
    assert human.prefer(asked)[1] == 0.0
    voter.join()


def test_the_name_human_means_people():
    check_judge("human", "judge")
    with pytest.raises(TypeError, match=r"HumanJudge\(folder\)"):
        pairwise_scorer("human", tiny.tokenizer())
    with pytest.raises(ValueError, match="means people"):
        judge("human")
    with pytest.raises(ValueError, match="above 0"):
        HumanJudge("out", timeout=0.0)
