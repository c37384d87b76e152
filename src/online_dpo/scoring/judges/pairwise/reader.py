"""The protocol between :class:`PairwiseModelJudge` and a kind of pairwise model, and helpers for all kinds.

Shapes: ``R`` texts of one forward pass, ``T`` tokens of a text.
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
    """Reads a prompt and two completions as one text, and gives the log-odds that the first completion is better.

    ``max_tokens`` is the longest text that the model reads. ``pads`` says whether texts of different lengths may be in
    one forward pass.
    """

    max_tokens: int
    pads: bool

    def token_ids(self, comparisons: Sequence[Group]) -> list[Text]:
        """Return the token ids of each comparison, with its completions in their order and nothing truncated."""
        ...

    def log_odds(self, texts: Sequence[Text]) -> list[float]:
        """Return the log-odds that the first completion is better; nan if the model gives none.

        The texts are one forward pass, the longest first.
        """
        ...


def padded(texts: Sequence[Text], fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both (R, T) and padded on the right."""
    longest = max(map(len, texts))
    ids_RT = torch.tensor([[*ids, *[fill] * (longest - len(ids))] for ids in texts], device=device)
    mask_RT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts], device=device)
    return ids_RT, mask_RT


def tokenised(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """The token ids of each text, not truncated; with ``special``, including the tokenizer's special tokens."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=special, truncation=False, verbose=False)["input_ids"]  # pyright: ignore


def device_of(model: nn.Module) -> Any:
    """The device of a model's first parameter."""
    return next(model.parameters()).device
