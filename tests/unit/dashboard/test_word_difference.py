"""The difference of two texts: what is shared, what is not, and a bound on the work."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo.dashboard.word_difference import Segment, word_difference


def test_words_that_differ_are_marked():
    one, other = word_difference("A red house, not small.", "A blue house, not small.")
    assert one == [Segment("A", False), Segment(" red", True), Segment(" house, not small.", False)]
    assert other == [Segment("A", False), Segment(" blue", True), Segment(" house, not small.", False)]


@pytest.mark.parametrize(("one", "other"), [("", ""), ("same text", "same text"), ("", "all new"), ("gone", "")])
def test_ends_of_the_range(one, other):
    first, second = word_difference(one, other)
    assert [segment.changed for segment in first] == ([one != other] if one else [])
    assert [segment.changed for segment in second] == ([one != other] if other else [])


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_the_segments_are_the_texts_and_both_share_the_same_words(one, other):
    first, second = word_difference(one, other)
    assert "".join(segment.text for segment in first) == one
    assert "".join(segment.text for segment in second) == other
    shared = ["".join(segment.text for segment in side if not segment.changed) for side in (first, second)]
    assert shared[0] == shared[1]


@pytest.mark.parametrize("words", [1000, 40_000])
@pytest.mark.parametrize("vocabulary", [2, 50, 5000])
def test_long_and_repetitive_texts_take_no_minutes(words, vocabulary):
    rng = random.Random(0)
    one, other = (" ".join(f"w{rng.randrange(vocabulary)}" for _ in range(words)) for _ in range(2))
    started = time.process_time()
    word_difference(f"Begin {one} end", f"Begin {other} end")
    assert time.process_time() - started < 20.0
