"""Who sees whom in a row, in masks and through FlexAttention."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.modeling.attention.masks import (
    attention_inputs,
    use_flex_attention,
    visible_mask,
    why_not_shared,
)
from online_dpo.modeling.logprobs import row_logprobs
from online_dpo.packing.pack import pack_groups
from support import tiny
from support.single_sequences import groups, oracle, ready


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


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in ("gpt2", "gemma2")])
def test_flex_attention_equals_single_sequences(family):
    model, made = ready(tiny.causal_lm(family)), groups()
    expected, _ = oracle(model, made)
    use_flex_attention(model)
    rows = pack_groups(made, [], True, 200)
    kinds = attention_inputs(model, rows.tokens)["attention_mask"]
    assert all(isinstance(mask, BlockMask) for mask in (kinds.values() if isinstance(kinds, dict) else [kinds]))
    torch.testing.assert_close(row_logprobs(model, rows).token_logps_M, expected, atol=1e-5, rtol=1e-5)
    padded = row_logprobs(model, pack_groups(made, [], False)).token_logps_M  # everything else goes through SDPA
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-5)


def test_flex_attention_is_not_saved_with_the_model_and_generation_stays_the_same(tmp_path):
    model, ids = tiny.causal_lm(), torch.tensor([[5, 6, 7]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    use_flex_attention(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)
    model.save_pretrained(tmp_path)
    assert "flex" not in (tmp_path / "config.json").read_text()


def test_flex_attention_wants_sdpa_and_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="soft cap"):
        use_flex_attention(tiny.causal_lm("gemma2"))
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        use_flex_attention(tiny.causal_lm(attn_implementation="eager"))
    with pytest.raises(ValueError, match="needs a GPU"):
        OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, flex_attention=True)
