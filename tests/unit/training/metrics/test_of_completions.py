"""Metrics of completions and scorers, against values by hand."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from online_dpo.packing.pack import pack_pairs
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.agreement import record_agreement_of_scorers, record_agreement_with_labels
from online_dpo.training.metrics.diversity import record_diversity
from online_dpo.training.metrics.kl_by_position import record_kl_by_position
from online_dpo.training.metrics.loss import record_loss
from online_dpo.training.metrics.pairs import record_pairs
from online_dpo.training.metrics.rollout import record_rollout
from online_dpo.types import Pair, Pairing, RowLogprobs, Scores
from support import tiny


def group(*completions):
    made = tiny.group(tiny.prompts([3])[0], [list(ids) for ids in completions])
    texts = [replace(c, text=" ".join(map(str, c.token_ids))) for c in made.completions]
    return replace(made, completions=tuple(texts))


def test_diversity_by_hand():
    store = MetricStore()
    # 5 tokens of 10 differ; bigrams: 56 66 of the first two, 78 89 91 of the third: 5 of 7 differ
    record_diversity(store, [group((5, 6, 6), (5, 6, 6), (7, 8, 9, 1)), group((5,))])
    assert store.drain() == {
        "completions/distinct_1": pytest.approx(6 / 10),
        "completions/distinct_2": pytest.approx(5 / 7),
        "completions/equal_ratio": pytest.approx(2 / 3),
    }


def test_diversity_leaves_out_what_an_opponent_wrote():
    made = group((5, 6), (5, 6), (7, 8))
    theirs = replace(made.completions[1], author="reference")
    store = MetricStore()
    record_diversity(store, [replace(made, completions=(made.completions[0], theirs, made.completions[2]))])
    assert store.drain()["completions/equal_ratio"] == 0.0


def test_the_score_of_longer_answers():
    """Lengths 1, 2, 3 with the scores 4, 6, 5, in two steps; a missing score counts nowhere."""
    store = MetricStore()
    record_rollout(store, [group((5,), (5, 6), (5, 6, 7, 8))], Scores([[4.0, 6.0, None]], {}), 0)
    record_rollout(store, [group((5, 6, 7), (5,))], Scores([[5.0, None]], {}), 0)
    assert store.drain()["completions/score_length_correlation"] == pytest.approx(0.5)
    record_rollout(store, [group((5,), (5, 6))], Scores([[1.0, 1.0]], {}), 0)
    assert "completions/score_length_correlation" not in store.drain()


def test_agreement_of_scorers_by_hand():
    scores = Scores(
        [[0.0] * 3, [0.0] * 2],
        {"a": [[1.0, 2.0, 3.0], [0.0, 1.0]], "b": [[1.0, 3.0, 2.0], [None, 1.0]], "c": [[5.0] * 3, [2.0, 1.0]]},
    )
    store = MetricStore()
    record_agreement_of_scorers(store, scores)
    # a and b: 01 alike, 02 alike, 12 not. a and c: only the pair of the second group, not alike. b and c: none
    assert store.drain() == {"agreement/a/b": pytest.approx(2 / 3), "agreement/a/c": 0.0}


def test_agreement_with_labels_by_hand():
    first, second = group((5,), (6,), (7,)), group((5,), (6,))
    scores = Scores([[0.0] * 3, [0.0] * 2], {"a": [[1.0, 2.0, 3.0], [0.0, 0.0]], "b": [[1.0, None, 0.0], [4.0, 1.0]]})
    pairs = [Pair(first, 2, 0), Pair(first, 0, 1), Pair(second, 0, 1)]
    store = MetricStore()
    record_agreement_with_labels(store, [first, second], scores, pairs)
    # a: yes, no, tie. b: no, missing, yes
    assert store.drain() == {"agreement/a/label": 0.5, "agreement/b/label": 0.5}


def test_lengths_of_chosen_and_rejected():
    made = group((5, 6, 7), (5,), (5, 6))
    store = MetricStore()
    record_pairs(store, 1, Pairing([Pair(made, 0, 1, 2.0, 1.0), Pair(made, 2, 1, 1.0, 0.0)], Counter()))
    log = store.drain()
    assert (log["completions/chosen_length"], log["completions/rejected_length"]) == (2.5, 1.0)
    assert log["completions/chosen_minus_rejected_length"] == 1.5


@pytest.mark.parametrize("shared", [True, False])
def test_kl_by_position_by_hand(shared):
    """Log-ratios that say the place: of each token, its place in its completion."""
    made = group([7] * 20, (5, 6), [8] * 300)
    rows = pack_pairs([Pair(made, 0, 1, 1.0, 0.0)], shared)
    place_M = torch.cat([torch.arange(n) for n in rows.length_S.tolist()]).float()
    store = MetricStore()
    used = torch.cat([rows.chosen_N, rows.rejected_N]).unique()
    record_kl_by_position(store, rows, place_M, used)
    log = store.drain()
    assert log == {
        "objective/kl_by_position/0-15": pytest.approx((sum(range(16)) + 1) / 18),
        "objective/kl_by_position/16-63": pytest.approx((16 + 17 + 18 + 19) / 4),
    }
    rows = pack_pairs([Pair(made, 2, 1, 1.0, 0.0)], shared)
    place_M = torch.cat([torch.arange(n) for n in rows.length_S.tolist()]).float()
    record_kl_by_position(store, rows, place_M, torch.arange(2))
    log = store.drain()
    assert log["objective/kl_by_position/64-255"] == pytest.approx((64 + 255) / 2)
    assert log["objective/kl_by_position/256-up"] == pytest.approx((256 + 299) / 2)


def test_kl_by_position_adds_up_to_the_kl():
    made = group((5, 6, 7), (8, 9))
    rows = pack_pairs([Pair(made, 0, 1, 1.0, 0.0)], shared=True)
    ratio = torch.tensor([0.5, 0.25, 0.125, 1.0, -0.5])
    sums = torch.stack([part.sum() for part in ratio.split(rows.length_S.tolist())])
    policy, reference = RowLogprobs(ratio, ratio, sums), RowLogprobs(0 * ratio, ratio, 0 * sums)
    store = MetricStore()
    record_loss(store, rows, policy, reference, torch.tensor([0.7]), beta=1.0)
    log = store.drain()
    assert log["objective/kl_by_position/0-15"] * 5 == pytest.approx(log["objective/kl"] * 2) == pytest.approx(1.375)
