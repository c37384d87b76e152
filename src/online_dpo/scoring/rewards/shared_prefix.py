"""Texts that begin alike, scored from rows in which their common beginning stands, and is computed, once.

Shapes: ``R`` rows, ``T`` tokens of a row, ``S`` texts, ``H`` hidden size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from online_dpo.errors import named_error
from online_dpo.modeling.attention.masks import attention_inputs, why_not_shared
from online_dpo.modeling.introspection import computing_dtype, unwrapped
from online_dpo.modeling.last_layer import last_layer_kwargs
from online_dpo.modeling.tolerance import SCORE_ROUNDING, allowed_difference
from online_dpo.packing.prefix_tree import Tree, lay_out

logger = logging.getLogger(__name__)

Text = tuple[int, ...]
PlainScores = Callable[[Sequence[Text]], list[float]]

SHORTEST_BEGINNING = 8
"""Tokens. What begins alike in all texts (a BOS, the header of a chat template) saves less than the mask costs."""

GROUPS, TEXTS = 2, 4


def group_trees(groups: Iterable[Iterable[Text]], batch_size: int, hidden_size: int) -> list[Tree]:
    """Trees of the texts of each group, at most ``batch_size`` texts in a tree.

    Equal texts stand in one tree only. Texts of less than two tokens stand in none. Where sharing would not be faster,
    each text is a tree.

    >>> group_trees([[(1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 4, 5, 6, 7, 8, 10)]], batch_size=16, hidden_size=512)
    [Tree(prompt=(1, 2, 3, 4, 5, 6, 7, 8), branches=((9,), (10,)))]
    """
    trees: list[Tree] = []
    seen: set[Text] = set()
    for group in groups:
        texts = [text for text in dict.fromkeys(group) if len(text) > 1 and text not in seen]
        seen.update(texts)
        for start in range(0, len(texts), batch_size):
            trees += _trees(texts[start : start + batch_size], hidden_size)
    return trees


def passes(trees: Sequence[Tree], batch_size: int, most_tokens: float = math.inf) -> list[list[Tree]]:
    """The trees in lists of at most ``batch_size`` texts and ``most_tokens`` padded tokens (or a single tree), trees
    of similar size together.
    """
    batches: list[list[Tree]] = []
    room, longest = 0, 0
    for tree in sorted(trees, key=lambda tree: tree.size, reverse=True):
        if len(tree.branches) > room or longest * (len(batches[-1]) + 1) > most_tokens:
            batches.append([])
            room, longest = batch_size, tree.size
        batches[-1].append(tree)
        room -= len(tree.branches)
    return batches


@torch.no_grad()
def score_trees(model: nn.Module, trees: Sequence[Tree], capacity: int = 0) -> dict[Text, float]:
    """The score at the last token of each text, from one forward pass over rows of ``capacity`` tokens or more."""
    tokens, places = lay_out(trees, shared=True, capacity=capacity)
    tokens = tokens.to(next(model.parameters()).device)
    texts, last_tokens = [], []
    for tree, tree_places in zip(trees, places, strict=True):
        for branch, place in zip(tree.branches, tree_places, strict=True):
            texts.append(tree.prompt + branch)
            last_tokens.append(place.start + len(branch) - 1)
    base: Any = unwrapped(model)
    read_X = torch.tensor(sorted(last_tokens)).to(tokens.ids_RT.device)
    inputs = attention_inputs(model, tokens) | last_layer_kwargs(base, read_X)
    hidden_RTH = base.base_model(input_ids=tokens.ids_RT, use_cache=False, **inputs)[0]
    scores_S1 = base.score(hidden_RTH.flatten(0, 1)[last_tokens])
    return dict(zip(texts, scores_S1[:, 0].float().tolist(), strict=True))


def may_share(model: nn.Module, name: str, trees: Sequence[Tree], plain: PlainScores) -> bool:
    """Whether trees give this model's texts the scores that they get alone, found on the largest few trees.

    Args:
        name: the model's, for the warning that says why not.
        trees: of texts to score; those that share a beginning are used.
        plain: scores of texts that are padded and computed in one forward pass.
    """
    if not hasattr(unwrapped(model), "score"):
        # Decoders of transformers name so the head that reads one token. Encoders, whose tokens see those behind them,
        # have another: that is how they are, and nothing to warn of.
        logger.debug("Reward model `%s` has no head called `score`; common beginnings are not shared.", name)
        return False
    reason = _why_not(model, trees, plain)
    if reason is not None:
        logger.warning("Reward model `%s` computes common beginnings for each text anew: %s.", name, reason)
    return reason is None


def _why_not(model: nn.Module, trees: Sequence[Tree], plain: PlainScores) -> str | None:
    """The yardstick is each text alone. Wrong scores are as far from it as scores are from each other, right ones by
    rounding: by a small part of their size, or by a few times what padding changes.
    """
    shared = sorted((tree for tree in trees if len(tree.branches) > 1), key=lambda tree: tree.size, reverse=True)
    sample = [replace(tree, branches=tree.branches[:TEXTS]) for tree in shared[:GROUPS]]
    try:
        if reason := why_not_shared(model):
            return reason
        scores = score_trees(model, sample, capacity=sum(tree.size for tree in sample))  # in one row
    except Exception as error:  # whatever an unknown model does with such inputs
        return f"it fails with {named_error(error, first_line=True)}"
    texts = list(scores)
    alone_S = torch.tensor([plain([text])[0] for text in texts])
    padding = float((torch.tensor(plain(texts)) - alone_S).abs().mean())
    rounding = SCORE_ROUNDING[computing_dtype(model)] * float(alone_S.abs().mean())
    allowed = allowed_difference(padding, rounding)
    exact = SCORE_ROUNDING[torch.float32] * float(alone_S.abs().mean())
    allowed = min(allowed, max(exact, float(alone_S.std()) / 10))  # scores far from 0 may still be close to each other
    found = float((torch.tensor(list(scores.values())) - alone_S).abs().mean())
    if found <= allowed:
        return None
    return f"scores differ by {found:.1e}, where {allowed:.1e} could be rounding"


def _trees(texts: list[Text], hidden_size: int) -> list[Tree]:
    """One tree of the texts, or one for each where they have no beginning in common that is worth sharing."""
    common = _common_beginning(texts)
    together = Tree(texts[0][:common], tuple(text[common:] for text in texts))
    if len(texts) == 1:
        return [together]
    apart = sum(_cost(len(text), hidden_size) for text in texts)
    if common < SHORTEST_BEGINNING or _cost(together.size, hidden_size) >= apart:
        return [Tree(text[:-1], (text[-1:],)) for text in texts]
    return [together]


def _cost(tokens: int, hidden_size: int) -> float:
    """What a row costs: its tokens, and its attention, which counts the texts that do not see each other as well.

    In a transformer layer, the matrices take about 24 H^2 operations a token and attention 4 T H. Measured, rows of
    long answers to short prompts are as much slower than padded ones as this says.
    """
    return tokens * (1 + tokens / (6 * hidden_size))


def _common_beginning(texts: list[Text]) -> int:
    """Tokens that all texts begin with; each keeps its last token, the scored one, for itself."""
    room = min(len(text) for text in texts) - 1
    return next((i for i in range(room) if len({text[i] for text in texts}) > 1), room)
