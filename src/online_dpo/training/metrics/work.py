"""Counts the floating-point operations and tokens of a step: an estimate from shapes, nothing is measured.

A weight costs 2 operations for each token that is read, and as many again for the gradient of its input and for its
own. Attention costs 4 for each token, layer, and number of a query for every token that it sees, and twice that in the
backward pass. The head over the vocabulary is read for the tokens of completions alone. Activations that are computed
a second time (gradient checkpointing), embeddings, norms, and models that score are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from online_dpo.modeling.quantization import sizes
from online_dpo.packing.pack import by_group
from online_dpo.training.metric_store import MetricStore
from online_dpo.types import Feedback, PackedRows

FLOPS, TRAINED_TOKENS, SAMPLED_TOKENS = "flops", "trained_tokens", "completion_tokens"
"""Totals that a log turns into figures per second."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of some sequences: all that are read, those that are predicted, and the sum over all of them of how many
    tokens each sees.

    >>> Tokens.of_group(prompt=2, completions=[3])
    Tokens(read=5, predicted=3, seen=15)
    """

    read: int = 0
    predicted: int = 0
    seen: int = 0

    @classmethod
    def of_group(cls, prompt: int, completions: Sequence[int]) -> Tokens:
        """Return those of one prompt, which is read once, and its completions, given their lengths."""
        count = sum(completions)
        seen = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in completions)
        return cls(prompt + count, count, seen)

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.read + other.read, self.predicted + other.predicted, self.seen + other.seen)


@dataclass(frozen=True)
class ModelCost:
    """What a decoder costs: the numbers of its layers' weights and of its head, and how many of these are trained;
    ``attention`` is the width of all queries of all layers.
    """

    body: int
    head: int
    trained_body: int
    trained_head: int
    attention: int

    def forward(self, tokens: Tokens) -> int:
        """Return the operations of a forward pass, or of sampling with a cache."""
        return 2 * self.body * tokens.read + 2 * self.head * tokens.predicted + 4 * self.attention * tokens.seen

    def training(self, tokens: Tokens) -> int:
        """Return the operations of a forward and a backward pass: 3 times a forward pass where all is trained."""
        weights = 2 * self.trained_body * tokens.read + 2 * self.trained_head * tokens.predicted
        return 2 * self.forward(tokens) + weights + 4 * self.attention * tokens.seen


def cost_of(model: nn.Module) -> ModelCost | None:
    """Return what a model costs, while its weights are whole. ``None`` for one with experts, of which each token takes
    a few that shapes do not tell, and for one whose config has other names for its layers and their size.
    """
    decoder: Any = model
    config = decoder.config.get_text_config()
    if any(".experts." in name for name, _ in model.named_parameters()) or not (
        hasattr(config, "num_hidden_layers") and hasattr(config, "hidden_size")
    ):
        return None
    counts = list(sizes(model))
    total, trained = sum(n for n, _, _ in counts), sum(n for n, _, is_trained in counts if is_trained)
    embedding, head = decoder.get_input_embeddings().weight, decoder.get_output_embeddings()
    embeddings = {embedding, *(part.weight for part in model.modules() if isinstance(part, nn.Embedding))}
    head_weight = embedding if head is None else head.weight
    head_numbers, tied = head_weight.numel(), head_weight is embedding
    trained_head = head_numbers * head_weight.requires_grad
    return ModelCost(
        body=total - sum(one.numel() for one in embeddings) - (0 if tied else head_numbers),
        head=head_numbers,
        trained_body=trained
        - sum(one.numel() for one in embeddings if one.requires_grad)
        - (0 if tied else trained_head),
        trained_head=trained_head,
        attention=sum(map(_query_width, config.per_layer_config)),
    )


def _query_width(layer: Any) -> int:
    """The width of all queries of a layer, from its config: layers may differ in it."""
    heads = getattr(layer, "num_attention_heads", 0)  # a model without attention has none
    return heads * (getattr(layer, "head_dim", None) or layer.hidden_size // max(heads, 1))


class Work:
    """Counts the work of a run in its metrics.

    Args:
        metrics: where it is counted.
        cost: what the policy costs; ``None`` if it is not known: then tokens alone are counted.
    """

    def __init__(self, metrics: MetricStore, cost: ModelCost | None = None) -> None:
        self._metrics, self._cost = metrics, cost

    def sampled(self, feedback: Feedback, here: bool) -> None:
        """Count what was sampled, in all rounds; what an opponent wrote was there before further rounds.

        Args:
            here: by this process, not by a server with devices of its own.
        """
        groups = [*feedback.groups, *(group for again in feedback.further for group in again.groups)]
        completions = [group.completions for group in feedback.groups]
        completions += [[c for c in group.completions if c.by_policy] for group in groups[len(completions) :]]
        lengths = [[len(completion.token_ids) for completion in of_group] for of_group in completions]
        self._metrics.total(SAMPLED_TOKENS, sum(map(sum, lengths)))
        if self._cost is not None and here:
            prompts = [len(group.prompt.token_ids) for group in groups]
            tokens = sum(map(Tokens.of_group, prompts, lengths), Tokens())
            self._metrics.total(FLOPS, self._cost.forward(tokens))

    def trained(self, rows: PackedRows, has_reference: bool) -> None:
        """Count a pass of training, with that of the reference."""
        tokens = _tokens(rows)
        self._metrics.total(TRAINED_TOKENS, tokens.read)
        if self._cost is not None:
            reference = self._cost.forward(tokens) if has_reference else 0
            self._metrics.total(FLOPS, self._cost.training(tokens) + reference)


def _tokens(rows: PackedRows) -> Tokens:
    """The tokens of a pass, from its pairs: nothing waits for the device on which the rows are."""
    total = Tokens()
    for members in by_group(rows.pairs):
        group = members[0].group
        used = {k for pair in members for k in (pair.chosen, pair.rejected)}
        prompt, lengths = len(group.prompt.token_ids), [len(group.completions[k].token_ids) for k in sorted(used)]
        parts = [lengths] if rows.tokens.shares_prompts else [[length] for length in lengths]
        total = sum((Tokens.of_group(prompt, part) for part in parts), total)
    return total
