"""What a pairwise model has to do for :class:`PairwiseModelJudge`, and what all kinds of them need.

R is the texts of one forward pass, T their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.types import Group

Text = tuple[int, ...]


class PairwiseReader(Protocol):
    """Reads two completions of a prompt as one text, and says which is better.

    ``token_ids`` are those of each comparison, its completions in the order in which they stand, and nothing cut off.
    ``log_odds`` are those of the first one being better, for texts of which the first is the longest; nan where the
    model gives none. ``max_tokens`` is the longest text that the model reads; with ``pads``, texts of different lengths
    may be read together.
    """

    max_tokens: int
    pads: bool

    def token_ids(self, comparisons: Sequence[Group]) -> list[Text]: ...

    def log_odds(self, texts: Sequence[Text]) -> list[float]: ...


def padded(texts: Sequence[Text], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, filled up on the right."""
    longest = max(map(len, texts))
    ids_RT = torch.tensor([[*ids, *[fill] * (longest - len(ids))] for ids in texts], device=device)
    mask_RT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts], device=device)
    return ids_RT, mask_RT


def tokenised(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=special, truncation=False, verbose=False)["input_ids"]  # pyright: ignore


def device_of(model: nn.Module) -> Any:
    return next(model.parameters()).device
