"""Rows in the lengths that attention kernels read fast.

Nothing that is read changes: padding attends to nothing that is read, and is not read. What counts tokens counts them
in the rows as they were packed.

Shapes: ``R`` rows, ``T`` tokens of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from online_dpo.modeling.attention import flex
from online_dpo.modeling.introspection import accepts_argument, unwrapped
from online_dpo.packing.prefix_tree import BLOCK, PADDING
from online_dpo.types import PackedRows, TokenRows

ROUNDED_ON = {"cuda"}
MULTIPLE = 64
"""Rows on a GPU have a multiple of so many tokens: masks are aligned, and few shapes occur."""


def fitted_rows(model: nn.Module, rows: PackedRows) -> PackedRows:
    """The rows, laid out as `fitted` does for this model."""
    tokens, (source_M, read_X) = fitted(model, rows.tokens, rows.source_M, rows.read_X)
    return replace(rows, tokens=tokens, source_M=source_M, read_X=read_X)


def fitted(model: nn.Module, tokens: TokenRows, *indices: torch.Tensor) -> tuple[TokenRows, tuple[torch.Tensor, ...]]:
    """The tokens in rows that suit the model's attention, and indices into the flattened rows moved with them.

    For FlexAttention, rows that share prompts are put into one, one behind the other, padded to whole blocks: a
    compiled kernel for one row is another than for several. On a GPU, other rows are padded to a multiple of
    `MULTIPLE`, if the model takes position ids. On a CPU nothing changes.
    """
    if tokens.shares_prompts and unwrapped(model).config.get_text_config()._attn_implementation == flex.NAME:
        together = _one_row(tokens)
        length = max(flex.SHORTEST, _rounded(together.ids_RT.shape[1], BLOCK))
        return padded(together, length), indices  # of a single row, they stay as they are
    if tokens.ids_RT.device.type not in ROUNDED_ON or not accepts_argument(model, "position_ids"):
        return tokens, indices
    before = tokens.ids_RT.shape[1]
    after = _rounded(before, MULTIPLE)
    return padded(tokens, after), tuple(index // before * after + index % before for index in indices)


def fitted_length(length: int, device: torch.device, longest: int | None) -> int:
    """The length of padded rows whose positions the model counts itself, of which it has ``longest``."""
    if device.type not in ROUNDED_ON:
        return length
    after = _rounded(length, MULTIPLE)
    return after if longest is None or after <= longest else length


def padded(tokens: TokenRows, length: int) -> TokenRows:
    """The rows with padding on the right, up to ``length`` tokens."""
    room = (0, length - tokens.ids_RT.shape[1])
    return replace(
        tokens,
        ids_RT=F.pad(tokens.ids_RT, room),
        positions_RT=F.pad(tokens.positions_RT, room),
        tree_RT=F.pad(tokens.tree_RT, room, value=PADDING),
        branch_RT=F.pad(tokens.branch_RT, room),
    )


def _one_row(tokens: TokenRows) -> TokenRows:
    """All rows one behind the other. Trees are numbered over all rows, so tokens attend to the same ones as before."""
    return replace(
        tokens,
        ids_RT=tokens.ids_RT.view(1, -1),
        positions_RT=tokens.positions_RT.view(1, -1),
        tree_RT=tokens.tree_RT.view(1, -1),
        branch_RT=tokens.branch_RT.view(1, -1),
    )


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
