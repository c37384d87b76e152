"""Scores of texts with a common prefix, from rows in which the prefix is stored and computed once.

Shapes: ``R`` rows, ``T`` tokens of a row, ``S`` texts, ``X`` scored positions, ``H`` hidden size.
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
from online_dpo.modeling.attention.choice import use_sdpa, uses_flex_attention
from online_dpo.modeling.attention.masks import attention_inputs, why_not_shared
from online_dpo.modeling.attention.rows import fitted
from online_dpo.modeling.introspection import computing_dtype, unwrapped
from online_dpo.modeling.last_layer import last_layer_kwargs
from online_dpo.modeling.tolerance import SCORE_ROUNDING, allowed_difference
from online_dpo.packing.prefix_tree import Tree, lay_out

logger = logging.getLogger(__name__)

Text = tuple[int, ...]
PlainScores = Callable[[Sequence[Text]], list[float]]

SHORTEST_PREFIX = 8
"""Fewest tokens worth sharing. A shorter prefix (a BOS, the header of a chat template) saves less than the mask
costs."""

CHECKED_TREES, CHECKED_TEXTS = 2, 4
"""Trees, and texts of each, on which `may_share` compares shared with separate scores."""


def group_trees(groups: Iterable[Iterable[Text]], batch_size: int, hidden_size: int) -> list[Tree]:
    """Group the texts of each group into prefix trees of at most ``batch_size`` texts.

    Equal texts are in one tree only. Texts of fewer than two tokens are in none. If sharing would not be faster, each
    text is a tree of its own.

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
    """Split the trees into forward passes of at most ``batch_size`` texts and ``most_tokens`` padded tokens.

    Trees of similar size are in one pass. A tree that is larger than the limits is a pass of its own.
    """
    batches: list[list[Tree]] = []
    free, longest = 0, 0
    for tree in sorted(trees, key=lambda tree: tree.size, reverse=True):
        if len(tree.branches) > free or longest * (len(batches[-1]) + 1) > most_tokens:
            batches.append([])
            free, longest = batch_size, tree.size
        batches[-1].append(tree)
        free -= len(tree.branches)
    return batches


@torch.no_grad()
def score_trees(model: nn.Module, trees: Sequence[Tree], capacity: int = 0) -> dict[Text, float]:
    """Score each text at its last token, in one forward pass over rows of at least ``capacity`` tokens."""
    if uses_flex_attention(model):
        capacity = max(capacity, sum(tree.size for tree in trees))  # one row, without padding between trees
    tokens, spans = lay_out(trees, shared=True, capacity=capacity)
    texts, last_tokens = [], []
    for tree, tree_spans in zip(trees, spans, strict=True):
        for branch, span in zip(tree.branches, tree_spans, strict=True):
            texts.append(tree.prompt + branch)
            last_tokens.append(span.start + len(branch) - 1)
    base: Any = unwrapped(model)
    device = next(model.parameters()).device
    last_S = torch.tensor(last_tokens).to(device)
    tokens, (last_S,) = fitted(model, tokens.to(device), last_S)
    read_X = last_S.sort().values
    inputs = attention_inputs(model, tokens) | last_layer_kwargs(base, read_X)
    hidden_RTH = base.base_model(input_ids=tokens.ids_RT, use_cache=False, **inputs)[0]
    scores_S1 = base.score(hidden_RTH.flatten(0, 1)[last_S])
    return dict(zip(texts, scores_S1[:, 0].float().tolist(), strict=True))


def may_share(model: nn.Module, name: str, trees: Sequence[Tree], plain: PlainScores) -> bool:
    """Check, on the largest few trees, whether shared rows give texts the scores that they get alone.

    Args:
        name: name of the model in the warning that says why not.
        trees: trees of the texts to score; those with a shared prefix are used.
        plain: computes scores of texts in padded rows, in one forward pass.
    """
    if not has_score_head(model):
        # `score` is what transformers calls the head of a decoder, which reads one token. Encoders have another head,
        # and their tokens attend to later ones: sharing cannot work there, and there is nothing to warn about.
        logger.debug("Reward model `%s` has no head called `score`; common prefixes are not shared.", name)
        return False
    reason = _why_not_shareable(model, trees, plain)
    if reason is not None and uses_flex_attention(model):
        logger.warning("Reward model `%s` is read through SDPA, not FlexAttention: %s.", name, reason)
        use_sdpa(model)
        reason = _why_not_shareable(model, trees, plain)
    if reason is not None:
        logger.warning("Reward model `%s` computes the common prefix again for each text: %s.", name, reason)
    return reason is None


def has_score_head(model: nn.Module) -> bool:
    """Whether the model has the head of a decoder, which scores one token."""
    return hasattr(unwrapped(model), "score")


def _why_not_shareable(model: nn.Module, trees: Sequence[Tree], plain: PlainScores) -> str | None:
    """The reason why shared rows are wrong for this model, ``None`` if they are right.

    Shared scores are compared with those of each text alone. Wrong ones differ as much as scores differ from each
    other; right ones differ by rounding: a small part of their size, or a few times the effect of padding.
    """
    shared = sorted((tree for tree in trees if len(tree.branches) > 1), key=lambda tree: tree.size, reverse=True)
    sample = [replace(tree, branches=tree.branches[:CHECKED_TEXTS]) for tree in shared[:CHECKED_TREES]]
    try:
        if reason := why_not_shared(model):
            return reason
        scores = score_trees(model, sample, capacity=sum(tree.size for tree in sample))  # in one row
    except Exception as error:  # an unknown model may fail in any way on such inputs
        return f"it fails with {named_error(error, first_line=True)}"
    texts = list(scores)
    alone_S = torch.tensor([plain([text])[0] for text in texts])
    padding = float((torch.tensor(plain(texts)) - alone_S).abs().mean())
    rounding = SCORE_ROUNDING[computing_dtype(model)] * float(alone_S.abs().mean())
    allowed = allowed_difference(padding, rounding)
    exact = SCORE_ROUNDING[torch.float32] * float(alone_S.abs().mean())
    allowed = min(allowed, max(exact, float(alone_S.std()) / 10))  # scores far from 0 may still be close to each other
    difference = float((torch.tensor(list(scores.values())) - alone_S).abs().mean())
    if difference <= allowed:
        return None
    return f"scores differ by {difference:.1e}, where {allowed:.1e} could be rounding"


def _trees(texts: list[Text], hidden_size: int) -> list[Tree]:
    """One tree of all texts, or one tree for each text if they have no common prefix that is worth sharing."""
    common = _common_prefix(texts)
    together = Tree(texts[0][:common], tuple(text[common:] for text in texts))
    if len(texts) == 1:
        return [together]
    apart = sum(_cost(len(text), hidden_size) for text in texts)
    if common < SHORTEST_PREFIX or _cost(together.size, hidden_size) >= apart:
        return [Tree(text[:-1], (text[-1:],)) for text in texts]
    return [together]


def _cost(tokens: int, hidden_size: int) -> float:
    """The relative cost of a row: its tokens, plus attention between all of them, also between separate branches.

    In a transformer layer, the matrices take about 24 H^2 operations for each token and attention 4 T H. Measured times
    of long answers to short prompts agree with this estimate.
    """
    return tokens * (1 + tokens / (6 * hidden_size))


def _common_prefix(texts: list[Text]) -> int:
    """The number of tokens that all texts begin with, without the last token of each text, which is scored."""
    longest = min(len(text) for text in texts) - 1
    return next((i for i in range(longest) if len({text[i] for text in texts}) > 1), longest)
