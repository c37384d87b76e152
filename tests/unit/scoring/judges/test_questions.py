"""What a judge was asked and answered stands in its verdicts: every comparison, in each order, word for word."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from online_dpo.scoring.assess import AssessmentOptions, Assessor
from online_dpo.scoring.judges.adapters import FunctionJudge, JudgeScorer
from online_dpo.scoring.judges.llm.judge import LLMJudge
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.scoring.judges.top_k import judge_the_top
from online_dpo.scoring.judges.tournament import find_preferences
from online_dpo.scoring.penalties import Penalties
from online_dpo.stats.preference import sigmoid
from online_dpo.types import Comparison, Completion, Group, Prompt, Question, Scores, Verdicts
from support import tiny
from support.endpoint import error, says, serving, shown
from support.llm_judges import judge_of, longer_wins


def group(*texts: str, content: Any = "Say something.", cut: tuple[str, ...] = ()) -> Group:
    """Completions with these texts; those whose text is in ``cut`` did not end."""
    completions = (Completion((1,), (-1.0,), "length" if text in cut else "stop", 0, text) for text in texts)
    return Group(Prompt(content, (1,), 0), tuple(completions))


def questions(verdicts: Verdicts, place: int = 0) -> tuple[Question, ...]:
    [comparison] = verdicts.comparisons[place]
    return comparison.questions


# a language model -----------------------------------------------------------------------------------------------------


def test_both_orders_with_words_tokens_cost_and_seconds():
    def answer(body, number):
        first, _ = shown(body)
        return says("The first is longer.\nVerdict: A" if first == "long one" else "Verdict: A", usage=(100, 7))

    with serving(answer) as endpoint:
        judge = judge_of(endpoint, template="reasoned", input_price=2.0, output_price=10.0, inconsistent="soften")
        verdicts = find_preferences([group("s", "long one")], judge)
    [comparison] = verdicts.comparisons[0]
    assert (comparison.first, comparison.second, comparison.probability) == (0, 1, 0.5)
    given, swapped = comparison.questions
    assert (given.swapped, given.probability, given.words) == (False, 1.0, "Verdict: A")
    assert (swapped.swapped, swapped.probability) == (True, 1.0)
    assert swapped.words == "The first is longer.\nVerdict: A"
    for question in comparison.questions:
        assert question.tokens == 107 and question.cost == pytest.approx((100 * 2 + 7 * 10) / 1e6)
        assert question.seconds is not None and 0 < question.seconds < 30
        assert question.failure is None and not question.cached


def test_what_the_cache_answers_says_so_and_used_nothing():
    with serving(longer_wins) as endpoint:
        judge = judge_of(endpoint)
        first = find_preferences([group("a", "bb")], judge)
        again = find_preferences([group("bb", "a"), group("a", "bb")], judge)
        assert len(endpoint.seen) == 2
    assert [question.cached for question in questions(first)] == [False, False]
    turned, same = again.comparisons
    assert [(q.swapped, q.words, q.cached, q.tokens, q.cost, q.seconds) for q in turned[0].questions] == [
        (False, "A", True, None, None, None),
        (True, "B", True, None, None, None),
    ]
    assert turned[0].probability == pytest.approx(0.9) and same[0].probability == pytest.approx(0.1)
    assert [q.probability for q in same[0].questions] == [pytest.approx(0.1), pytest.approx(0.9)]


def test_every_vote_is_told_in_its_order():
    letters = iter("ABAB" * 9)
    with serving(lambda body, number: says(next(letters))) as endpoint:
        judge = judge_of(endpoint, votes=3, logprobs=False, concurrency=1)
        told = questions(find_preferences([group("a", "bb")], judge))
    assert [question.swapped for question in told] == [False] * 3 + [True] * 3
    assert sorted(question.words for question in told) == ["A"] * 3 + ["B"] * 3  # pyright: ignore[reportArgumentType]


def test_a_question_without_an_answer_says_why():
    def answer(body, number):
        return says("I cannot choose.") if shown(body)[0] == "bb" else error(400, "not today")

    with serving(answer) as endpoint:
        judge = judge_of(endpoint, max_failure_share=1.0, logprobs=False)
        verdicts = find_preferences([group("a", "bb")], judge)
    [comparison] = verdicts.comparisons[0]
    assert comparison.probability is None and verdicts.preferences == [None] and verdicts.unanswered == 1
    refused, unread = comparison.questions
    assert (refused.probability, refused.words) == (None, None) and "not today" in str(refused.failure)
    assert (unread.words, unread.failure) == ("I cannot choose.", "there is no verdict in the answer")


def test_a_subclass_and_a_wrapper_tell_as_well():
    class Cautious(LLMJudge):
        def prefer(self, comparisons):
            return [None if p is None else 0.5 + (p - 0.5) / 2 for p in super().prefer(comparisons)]

    class Wrapper:
        name = "wrapper"

        def __init__(self, judge):
            self.judge = judge

        def prefer(self, comparisons):
            return [None if p is None else 1 - p for p in self.judge.prefer(comparisons)]

    with serving(longer_wins) as endpoint:
        cautious = Cautious(model="org/judge", base_url=endpoint.url, cache=None)
        verdicts = find_preferences([group("a", "bb")], cautious)
        assert verdicts.comparisons[0][0].probability == pytest.approx(0.3)
        assert [question.words for question in questions(verdicts)] == ["B", "A"]
        for limit in (None, 30.0):  # with a limit it is called in another thread
            assessor = Assessor([], Wrapper(cautious), lambda limit=limit: AssessmentOptions(timeout=limit))
            verdicts = assessor.assess([group("a", "bb")])
            assert isinstance(verdicts, Verdicts) and verdicts.comparisons[0][0].probability == pytest.approx(0.7)
            assert [question.words for question in questions(verdicts)] == ["B", "A"]


def test_messages_as_prompts():
    with serving(longer_wins) as endpoint:
        prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        verdicts = find_preferences([group("a", "bb", content=prompt)], judge_of(endpoint))
    assert [question.words for question in questions(verdicts)] == ["B", "A"]


# other judges ---------------------------------------------------------------------------------------------------------


def test_a_pairwise_model_tells_the_probability_of_each_order():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, num_labels=1, max_position_embeddings=32, initializer_range=0.5, **sizes
    )
    judge = PairwiseModelJudge(BertForSequenceClassification(config).eval(), tiny.tokenizer())
    verdicts = find_preferences([group("w1 w2 w3", "w4"), group("w1", " ".join(["w5"] * 40))], judge)
    given, swapped = questions(verdicts)
    assert given.probability is not None and swapped.probability is not None
    assert verdicts.comparisons[0][0].probability == pytest.approx((given.probability + 1 - swapped.probability) / 2)
    assert [question.swapped for question in (given, swapped)] == [False, True]
    too_long = questions(verdicts, 1)
    assert [question.failure for question in too_long] == ["too long for the model, which reads 32 tokens"] * 2
    assert verdicts.comparisons[1][0].probability is None


def test_functions_and_judges_in_other_forms():
    groups = [group("a", "bb"), group("ccc", "dddd")]
    function = FunctionJudge(lambda prompt, first, second: math.nan if first == "ccc" else 0.25, max_failure_share=1.0)
    verdicts = find_preferences(groups, function)
    assert verdicts.comparisons == [
        (Comparison(0, 1, 0.25, (Question(False, 0.25),)),),
        (Comparison(0, 1, None, (Question(False, None, failure="its preference is nan"),)),),
    ]

    def ranks(prompts, pairs, shuffle_order=True):
        return [1, -1]

    verdicts = find_preferences(groups, JudgeScorer(ranks, tiny.tokenizer()))
    assert verdicts.comparisons == [(Comparison(0, 1, 0.0),), (Comparison(0, 1, None),)]


def test_any_number_is_a_probability():
    class Says:
        name = "says"
        answers = iter([torch.tensor(0.25), Fraction(1, 4), np.float32(0.25), True])

        def prefer(self, comparisons):
            return [next(self.answers) for _ in comparisons]

    verdicts = find_preferences([group("a", "bb")] * 4, Says())  # pyright: ignore[reportArgumentType]
    probabilities = [comparison.probability for [comparison] in verdicts.comparisons]
    assert probabilities == [0.25, 0.25, 0.25, 1.0] and {type(p) for p in probabilities} == {float}


# tournaments ----------------------------------------------------------------------------------------------------------


class Taste:
    """Prefers the text that comes later in the alphabet, with 0.9."""

    name = "taste"

    def prefer(self, comparisons):
        return [0.9 if first.text > second.text else 0.1 for first, second in (c.completions for c in comparisons)]


def test_every_comparison_of_a_tournament_is_told_with_places_in_the_group():
    verdicts = find_preferences([group("b", "d", "a", "c"), group("x", "x"), group("p", "p", "q")], Taste())
    assert verdicts.comparisons == [
        tuple(Comparison(*one) for one in [(0, 1, 0.1), (2, 3, 0.1), (1, 3, 0.9), (0, 2, 0.9), (1, 2, 0.9)]),
        (),
        (Comparison(0, 2, 0.1),),
    ]
    assert verdicts.duels == sum(map(len, verdicts.comparisons))


def test_the_judge_of_the_highest_scores_tells_as_well():
    scores = Scores([[0.1, 0.9, 0.8, 0.2], [None, 1.0, None, None]], {})
    groups = [group("b", "d", "a", "c"), group("b", "d", "a", "c")]
    verdicts = judge_the_top(groups, scores, Taste(), 2)
    assert verdicts.comparisons == [(Comparison(1, 2, 0.9), Comparison(1, 0, 0.9)), ()]


def test_penalties_shift_the_comparison_and_are_told():
    penalties = Penalties(missing_eos=1.0)
    verdicts = find_preferences([group("b", "a", cut=("b",))], Taste(), penalties)
    [comparison] = verdicts.comparisons[0]
    assert comparison.probability == pytest.approx(sigmoid(math.log(9) - 1.0))
    assert verdicts.penalties == [[{"missing_eos": 1.0}, {}]]
    assert find_preferences([group("b", "a")], Taste()).penalties == []
