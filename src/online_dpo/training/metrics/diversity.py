"""Records how different the completions of a prompt are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from online_dpo.stats.catalogue import Metric, describe
from online_dpo.training.metric_store import MetricStore
from online_dpo.types import Group

describe(
    "Completions",
    Metric(
        "completions/distinct_1",
        "share",
        "mean over groups of different tokens / tokens, over all completions of the policy in the group",
        "Falls as answers to one prompt become alike, and as they become longer or repeat themselves.",
    ),
    Metric(
        "completions/distinct_2",
        "share",
        "the same for pairs of neighbouring tokens",
        "A fall to a fraction of its first value is a collapse: raise `temperature` or `beta`, or lower the rate.",
    ),
    Metric(
        "completions/equal_ratio",
        "share",
        "completions of the policy whose text another one in the group has as well / completions",
        "Such completions give no pair. High: `temperature` is too low, or the policy has collapsed.",
    ),
)


def record_diversity(store: MetricStore, groups: Sequence[Group]) -> None:
    """Records the diversity of each group with two or more completions of the policy."""
    own = [[completion for completion in group.completions if completion.by_policy] for group in groups]
    own = [completions for completions in own if len(completions) > 1]
    ids = [[completion.token_ids for completion in completions] for completions in own]
    counts = [sum(map(len, parts)) for parts in ids]
    store.mean("completions/distinct_1", [len(set().union(*p)) / n for p, n in zip(ids, counts, strict=True) if n])
    store.mean("completions/distinct_2", [share for parts in ids if (share := _distinct_bigrams(parts)) is not None])
    for completions in own:
        texts = Counter(completion.text for completion in completions)
        shared = sum(count for count in texts.values() if count > 1)
        store.ratio("completions/equal_ratio", shared, len(completions))


def _distinct_bigrams(parts: Sequence[Sequence[int]]) -> float | None:
    """The share of different pairs of neighbours among all; ``None`` where there is none."""
    tokens = [np.fromiter(part, np.int64, len(part)) for part in parts]
    pairs = np.sort(np.concatenate([(part[:-1] << 32) + part[1:] for part in tokens]))
    return (1 + int((pairs[1:] != pairs[:-1]).sum())) / len(pairs) if len(pairs) else None
