"""Records the KL to the reference by the place of a token in its completion."""

from __future__ import annotations

import torch

from online_dpo.stats.catalogue import Metric, describe
from online_dpo.training.metric_store import MetricStore
from online_dpo.types import PackedRows

STARTS = (0, 16, 64, 256)
"""The first place of each bucket."""
NAMES = tuple(
    f"objective/kl_by_position/{start}-{'up' if end is None else end - 1}"
    for start, end in zip(STARTS, (*STARTS[1:], None), strict=True)
)

describe(
    "Loss and objective",
    *(
        Metric(
            name,
            "nats a token",
            f"mean log-ratio to the reference over the tokens {name.rpartition('/')[2]} of trained completions",
            "Where in an answer the policy has changed. All in the first tokens: an opening has been learnt.",
            when="with a reference, and completions of that length",
        )
        for name in NAMES
    ),
)


def record_kl_by_position(
    store: MetricStore, rows: PackedRows, log_ratio_M: torch.Tensor, used_S: torch.Tensor
) -> None:
    """Records the mean log-ratio of the tokens in each bucket, over the completions with the indices ``used_S``.

    Nothing here waits for the device: buckets are masks and not selections, whose size the host would have to know.
    """
    length_S, count = rows.length_S, len(log_ratio_M)
    begin_S = length_S.cumsum(0) - length_S
    place_M = torch.arange(count, device=length_S.device) - begin_S.repeat_interleave(length_S, output_size=count)
    is_used_S = torch.zeros_like(length_S, dtype=torch.bool).index_fill_(0, used_S, True)
    is_used_M = is_used_S.repeat_interleave(length_S, output_size=count)
    for name, start, end in zip(NAMES, STARTS, (*STARTS[1:], count), strict=True):
        store.mean(name, log_ratio_M, where=is_used_M & (place_M >= start) & (place_M < end))
