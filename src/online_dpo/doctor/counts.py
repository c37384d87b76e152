"""How many numbers a model's weights have, without loading them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Counts:
    """Numbers in a model's weights, rows of its embedding, and the sum of inputs and outputs of the linear layers
    that an adapter is put on: all but the head.
    """

    parameters: int
    embedding_rows: int
    linear_edges: int


def count_parameters(config: Any) -> Counts:
    """Returns the counts of a causal language model with this config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    head = model.get_output_embeddings()
    linears = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    rows = model.get_input_embeddings().weight.shape[0]
    return Counts(sum(p.numel() for p in model.parameters()), rows, sum(sum(one.shape) for one in linears))
