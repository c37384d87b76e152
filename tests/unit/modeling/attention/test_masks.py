"""Who sees whom in a row, in masks and through FlexAttention."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

from online_dpo.modeling.attention.masks import (
    visible_mask,
    why_not_shared,
)
from online_dpo.modeling.logprobs import row_logprobs
from online_dpo.packing.pack import pack_groups
from support import tiny
from support.single_sequences import groups, ready


def test_windows_over_indices_in_the_row_are_refused():
    config = GPTNeoConfig(
        vocab_size=44, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    assert "indices in the row" in why_not_shared(GPTNeoForCausalLM(config))


@pytest.mark.smoke
@torch.no_grad()
def test_what_the_other_completions_say_changes_nothing():
    model, made = ready(tiny.causal_lm("gpt2")), groups()
    rows = pack_groups(made, [], True, 200)
    before = row_logprobs(model, rows).token_logps_M
    mine = (rows.tokens.tree_RT == 0) & (rows.tokens.branch_RT <= 1)
    changed = torch.where(mine, rows.tokens.ids_RT, 40)
    after = row_logprobs(model, replace(rows, tokens=replace(rows.tokens, ids_RT=changed))).token_logps_M
    assert torch.equal(after[:4], before[:4]) and not torch.allclose(after[4:], before[4:])


def test_visible_by_hand():
    rows = pack_groups([tiny.group(tiny.prompts([2])[0], [[5, 6], [7]])], [], True).tokens
    assert visible_mask(rows)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert visible_mask(rows, window=2)[0].int().tolist()[3:] == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    assert visible_mask(rows, chunk=2)[0].int().tolist()[2:] == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
