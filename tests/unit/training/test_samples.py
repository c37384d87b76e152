"""What a log shows of the groups of its step."""

import math

from online_dpo.runs.records import ComparisonRecord, CompletionRecord, GroupRecord, OrderRecord, PairRecord
from online_dpo.training.samples import PairSample, samples_of


def completion(text, score, **more):
    return CompletionRecord(text, len(text.split()), "stop", "policy", 0, rewards={"words": score}, score=score, **more)


def group(index, pairs, **more):
    completions = (completion("w1", 1.0, log_ratios=(0.5,)), completion("w1 w2 w3", 3.0, penalties={"length": 0.2}))
    fields = dict(prompt="Say it.", prompt_row=index, prompt_length=2, completions=completions, pairs=pairs)
    return GroupRecord(12, 0, index, 0, **{**fields, **more})


ONE = PairRecord(chosen=1, rejected=0, margin=2.0, implied=0.1)


def test_a_pair_says_why():
    [sample] = samples_of(12, [group(0, ()), group(3, (ONE,))], 4).pairs
    why = "words 3 against 1; penalty for length 0.2 against 0"
    assert sample == PairSample(12, "12-0-3-0", "Say it.", "w1 w2 w3", "w1", 3.0, 1.0, 1.0, why)


def test_a_judge_is_quoted_and_a_conversation_is_told():
    orders = (OrderRecord((0, 1), 0.2, words="The second is\nbetter."), OrderRecord((1, 0), None, failure="away"))
    comparison = ComparisonRecord(first=0, second=1, probability=0.2, orders=orders)
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    judged = PairRecord(chosen=1, rejected=0, probability=0.8)
    [sample] = samples_of(12, [group(0, (judged,), comparisons=(comparison,), prompt=prompt)], 4).pairs
    assert sample.prompt == "user: Hi\nassistant: Yes?" and sample.probability == 0.8
    assert sample.why.endswith("judge: 0.8; judge says 'The second is\\nbetter.'")


def test_each_pair_is_of_another_group_if_there_are_enough():
    other = PairRecord(chosen=0, rejected=1)
    groups = [group(0, (ONE, other)), group(1, (ONE,)), group(2, ())]
    assert [s.group for s in samples_of(12, groups, 2).pairs] == ["12-0-0-0", "12-0-1-0"]
    assert [s.group for s in samples_of(12, groups, 9).pairs] == ["12-0-0-0", "12-0-1-0", "12-0-0-0"]


def test_distributions_are_over_all_groups_and_only_of_what_there_is():
    found = samples_of(12, [group(0, (ONE,)), group(1, ())], 0).distributions
    assert found == {
        "length": [1, 3, 1, 3],
        "score": [1.0, 3.0, 1.0, 3.0],
        "token_log_ratio": [0.5, 0.5],
        "reward/words": [1.0, 3.0, 1.0, 3.0],
        "margin": [2.0],
        "implied_margin": [0.1],
    }


def test_numbers_of_a_step_that_is_skipped_are_left_out():
    """Trackers refuse a histogram of them, and would show nothing more of the run."""
    bad = completion("w1", 1.0, log_ratios=(math.nan, math.inf, 0.5))
    pair = PairRecord(chosen=0, rejected=1, margin=0.0, implied=math.nan)
    found = samples_of(12, [group(0, (pair,), completions=(bad, completion("w2", 1.0)))], 0).distributions
    assert found["token_log_ratio"] == [0.5] and "implied_margin" not in found
