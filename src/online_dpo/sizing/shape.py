"""The shapes of a model's weights, read from its config. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

BIASED_QKV = ("qwen2",)
NORMED_QK = ("qwen3",)
KNOWN = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` whose layers `ModelShape` describes."""


@dataclass(frozen=True)
class Weight:
    """A weight as it is stored: a matrix of ``rows`` and ``columns``, or a vector, which has one column.

    ``count`` equal ones stand in the model, one in each layer. ``linear``: it belongs to a linear layer that no other
    module shares, as a matrix or as a bias.
    """

    rows: int
    columns: int
    count: int
    linear: bool

    @property
    def numbers(self) -> int:
        """How many numbers one of them has."""
        return self.rows * self.columns


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder as Llama, Mistral, Qwen2 and Qwen3 have it: gated MLP, grouped attention, RMS norms.

    ``labels`` above 0: a reward model, with a head of so many rows in place of the vocabulary's.

    >>> MODELS["0.5B"].parameters
    494032768
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    labels: int = 0

    @property
    def kv_width(self) -> int:
        """Numbers in the keys (or the values) of one token and layer."""
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """How many numbers all weights have together."""
        return sum(weight.numbers * weight.count for weight in self.weights())

    @property
    def layer(self) -> int:
        """How many numbers the weights of one layer have."""
        return sum(weight.numbers for weight in self.of_a_layer())

    def weights(self) -> Iterator[Weight]:
        """Yields all weights; a tied head is the embedding's."""
        yield Weight(self.vocabulary, self.hidden, 1, linear=False)
        yield from self.of_a_layer()
        yield Weight(self.hidden, 1, 1, linear=False)
        if self.labels or not self.tied:
            yield Weight(self.labels or self.vocabulary, self.hidden, 1, linear=True)

    def projections(self) -> Iterator[tuple[int, int]]:
        """Yields outputs and inputs of each linear layer in a layer: query, key, value, output; gate, up, down."""
        attention = self.heads * self.head_dim
        yield attention, self.hidden
        yield self.kv_width, self.hidden
        yield self.kv_width, self.hidden
        yield self.hidden, attention
        yield self.intermediate, self.hidden
        yield self.intermediate, self.hidden
        yield self.hidden, self.intermediate

    def of_a_layer(self) -> Iterator[Weight]:
        """Yields the weights of the layers."""
        for place, (outputs, inputs) in enumerate(self.projections()):
            yield Weight(outputs, inputs, self.layers, linear=True)
            if self.qkv_bias and place < 3:
                yield Weight(outputs, 1, self.layers, linear=True)
        norms = [self.hidden] * 2 + [self.head_dim] * 2 * self.qk_norm
        yield from (Weight(size, 1, self.layers, linear=False) for size in norms)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Returns the shape that the content of a ``config.json`` describes.

    Raises:
        ValueError: the model is none of those that `ModelShape` describes.
    """
    kind = config["model_type"]
    if kind not in KNOWN:
        raise ValueError(f"Weights are counted for {', '.join(KNOWN)}; this model is a {kind!r}.")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return ModelShape(
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=kind in BIASED_QKV,
        qk_norm=kind in NORMED_QK,
    )


def as_reward_model(shape: ModelShape, labels: int = 1) -> ModelShape:
    """Returns the shape of a reward model over the same layers."""
    return replace(shape, labels=labels)


def _qwen(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, tied: bool
) -> ModelShape:
    size = hidden // heads
    return ModelShape(hidden, layers, heads, kv_heads, size, intermediate, vocabulary, tied, qkv_bias=True)


MODELS = {
    "0.5B": _qwen(896, 24, 14, 2, 4864, 151936, tied=True),
    "1.5B": _qwen(1536, 28, 12, 2, 8960, 151936, tied=True),
    "7B": _qwen(3584, 28, 28, 4, 18944, 152064, tied=False),
    "32B": _qwen(5120, 64, 40, 8, 27648, 152064, tied=False),
}
"""Qwen2.5's shapes by the name of their size."""
