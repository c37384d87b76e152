"""Records how far scorers agree with each other, and each of them with the labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from online_dpo.stats.catalogue import Metric, describe
from online_dpo.training.metric_store import MetricStore
from online_dpo.types import Group, Pair, Scores

LABEL = "label"

describe(
    "Scores",
    Metric(
        "agreement/NAME/OTHER",
        "share",
        "pairs of completions of one group that NAME and OTHER order alike / those that both order (ties left out)",
        "Near 0.5 two rewards have nothing in common; below it they work against each other.",
        when="with several rewards",
    ),
    Metric(
        f"agreement/NAME/{LABEL}",
        "share",
        "pairs trained on whose chosen completion NAME scores higher / those that NAME orders",
        "How much each reward decides. With a judge (`judge_top`), how far it agrees with the reward.",
        when="with a reward",
    ),
)


def record_agreement_of_scorers(store: MetricStore, scores: Scores) -> None:
    """Records for every two scorers how many pairs of completions within groups they order alike."""
    if len(scores.by_scorer) < 2:
        return
    orders = {name: _orders(rows) for name, rows in scores.by_scorer.items()}
    for (first, a), (second, b) in combinations(orders.items(), 2):
        ordered = (a != 0) & (b != 0)
        store.ratio(f"agreement/{first}/{second}", int((ordered & (a == b)).sum()), int(ordered.sum()))


def record_agreement_with_labels(
    store: MetricStore, groups: Sequence[Group], scores: Scores, pairs: Sequence[Pair]
) -> None:
    """Records for every scorer how many pairs it orders as they are labelled; ``groups`` are those of the scores."""
    place = {id(group): index for index, group in enumerate(groups)}
    pairs = [pair for pair in pairs if id(pair.group) in place]  # a method may make groups that nobody has scored
    for name, rows in scores.by_scorer.items():
        gaps = [_gap(rows[place[id(p.group)]], p.chosen, p.rejected) for p in pairs]
        store.ratio(f"agreement/{name}/{LABEL}", sum(gap > 0 for gap in gaps), sum(gap != 0 for gap in gaps))


def _gap(row: Sequence[float | None], chosen: int, rejected: int) -> float:
    """The chosen completion's score minus the rejected one's; 0 where one of them is missing."""
    first, second = row[chosen], row[rejected]
    return 0.0 if first is None or second is None else first - second


def _orders(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """1 or -1 for each pair of completions within a group, for whichever is higher; 0 for a tie or a missing score."""
    orders = [np.zeros(0)]
    for row in rows:
        values = np.array([np.nan if value is None else value for value in row], dtype=np.float64)
        first, second = np.triu_indices(len(values), 1)
        orders.append(np.nan_to_num(np.sign(values[first] - values[second])))
    return np.concatenate(orders)
