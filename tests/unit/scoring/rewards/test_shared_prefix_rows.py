"""Which texts share a row, and which models do not share at all: each with its reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    LlamaForCausalLM,
)

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.packing.prefix_tree import Tree
from online_dpo.scoring.registry import build_scorers
from online_dpo.scoring.rewards.model import RewardModelScorer
from online_dpo.scoring.rewards.shared_prefix import group_trees, passes
from support import tiny
from support.shared_prefix import (
    MIXED,
    OTHERS,
    OWN,
    SIZES,
    VOCABULARY,
    Seen,
    agree,
    answers,
    group,
    letters,
    reward_model,
    sharpened,
    tokenizer,
    truth,
)

# shared ---------------------------------------------------------------------------------------------------------------


def test_each_beginning_passes_the_body_once():
    model, tok = reward_model(), tokenizer()
    scorer = RewardModelScorer(model, tok)
    groups = [group(letters(40, seed=p), *answers(4, seed=p)) for p in range(3)]
    scorer.score(groups)
    seen = Seen(model)
    for asked in (groups[:1], groups[1:2]):
        scorer.score(asked)
        size = 1 + 40 + sum(len(answer.text) + 1 for answer in asked[0].completions)  # with BOS and EOS
        assert seen.shared.pop() == (1, size)
    scorer.score(groups)
    [(rows, length)] = seen.shared
    sizes = [1 + 40 + sum(len(answer.text) + 1 for answer in asked.completions) for asked in groups]
    assert rows == 3 and length == max(sizes)
    assert not seen.plain


def test_a_pass_has_no_more_texts_than_asked_for():
    model, tok = reward_model(), tokenizer()
    groups = [group(letters(20, seed=p), *(letters(4, seed=90 + k) for k in range(5))) for p in range(4)]
    scorer = RewardModelScorer(model, tok, batch_size=10)
    agree(scorer.score(groups), truth(model, tok, groups))
    seen = Seen(model)
    scorer.score(groups)
    assert seen.shared == [(2, 21 + 5 * 5)] * 2


def trees_of(groups: Any, batch_size: int = 16) -> list[Tree]:
    return group_trees(groups, batch_size, hidden_size=512)


def test_trees_of_groups():
    begin = tuple(range(10, 20))
    a, b, c = (*begin, 1), (*begin, 2, 3), begin
    assert trees_of([[a, b, a]]) == [Tree(begin, ((1,), (2, 3)))]
    assert trees_of([[a, c]]) == [Tree(begin[:-1], (begin[-1:] + (1,), begin[-1:]))], "each keeps its last token"
    assert trees_of([[a, b], [b, a]]) == trees_of([[a, b]]), "equal texts once"
    assert trees_of([[(5,), (), a]]) == [Tree(begin, ((1,),))]
    seven = begin[:7]
    assert trees_of([[(*seven, 1, 1), (*seven, 2)]]) == [Tree((*seven, 1), ((1,),)), Tree(seven, ((2,),))]
    many = [(*begin, k) for k in range(5)]
    assert [len(tree.branches) for tree in trees_of([many], 2)] == [2, 2, 1]
    assert trees_of([many], 2)[2] == Tree(begin, ((4,),))


@pytest.mark.parametrize(
    ("prompt", "answer", "count", "hidden_size", "trees"),
    [(200, 100, 4, 384, 1), (20, 200, 4, 384, 4), (10, 500, 8, 384, 8), (100, 200, 8, 384, 8), (100, 200, 8, 2048, 1)],
)
def test_long_answers_to_short_prompts_stay_apart(prompt, answer, count, hidden_size, trees):
    """As measured for the first four on a CPU: x1.7, x0.8, x0.4 and x0.9 as fast in one tree."""
    texts = [tuple(range(prompt)) + (1000 + k,) * answer for k in range(count)]
    assert len(group_trees([texts], 16, hidden_size)) == trees


def test_trees_of_passes():
    trees = [Tree((1,) * size, ((2,),) * count) for size, count in ((5, 3), (50, 2), (9, 1), (40, 2), (4, 3))]
    counts = [[(len(tree.prompt), len(tree.branches)) for tree in batch] for batch in passes(trees, 4)]
    assert counts == [[(50, 2), (40, 2)], [(9, 1), (5, 3)], [(4, 3)]]
    counts = [[len(tree.prompt) for tree in batch] for batch in passes(trees, 6, most_tokens=42)]
    assert counts == [[50], [40], [9, 5], [4]]  # trees of 52, 42, 10, 8 and 7 tokens


# not shared -----------------------------------------------------------------------------------------------------------


def test_asked_not_to(warnings):
    model, tok = reward_model(), tokenizer()
    seen = Seen(model)
    agree(RewardModelScorer(model, tok, share_prompts=False).score(MIXED), truth(model, tok, MIXED))
    assert not seen.shared and not warnings


def test_configuration_reaches_the_scorer(tmp_path):
    for share in (True, False):
        args = OnlineDPOConfig(output_dir=str(tmp_path), share_prompts=share, use_cpu=True, report_to="none")
        model = reward_model()
        seen = Seen(model)
        [scorer] = build_scorers(model, tokenizer(), args, state=None)
        scorer.score(MIXED[:1])
        assert bool(seen.shared) is share


def test_nothing_in_common_leaves_it_open(warnings):
    """Texts that share nothing are scored as ever; the check waits for texts that do."""
    model, tok = reward_model(), tokenizer()
    seen = Seen(model)
    scorer = RewardModelScorer(model, tok)
    groups = [group("a", "b", "cd"), group(letters(30, seed=1), "alone")]
    agree(scorer.score(groups), truth(model, tok, groups))
    assert not seen.shared and scorer._shares is None
    first = scorer.score(MIXED)
    assert seen.shared and scorer._shares
    seen.shared.clear()
    assert scorer.score(groups) and not seen.shared, "and afterwards they are scored no other way"
    assert scorer.score(MIXED) == first and not warnings


def test_encoder(warnings):
    config = BertConfig(**OWN, **SIZES, intermediate_size=48)
    model, tok = sharpened(config), tokenizer()
    scorer = RewardModelScorer(model, tok)
    agree(scorer.score(MIXED), truth(model, tok, MIXED))
    assert scorer._shares is False and not warnings


def blind(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """Attention that ignores the mask it is given."""

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, is_causal: bool = False, **options: Any) -> Any:
        return real(query, key, value, is_causal=causal, **options)

    real = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_that_ignores_the_mask_is_found(monkeypatch, warnings, causal, dtype):
    """Even where it sees padding, so that padding alone makes large differences."""
    blind(monkeypatch, causal)
    model, tok = reward_model().to(dtype), tokenizer()
    expected = RewardModelScorer(model, tok, share_prompts=False).score(MIXED)
    scorer = RewardModelScorer(model, tok, name="blind")
    assert scorer.score(MIXED) == scorer.score(MIXED) == expected
    [warning] = warnings
    assert "`blind`" in warning and "scores differ by" in warning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_sees_both_ways_is_found(warnings, dtype):
    """A decoder of transformers, configured to be an encoder, with the head of a decoder."""
    config = copy.deepcopy(OTHERS["gemma3"])
    config.use_bidirectional_attention = True
    model, tok = sharpened(config).to(dtype), tokenizer()
    scorer = RewardModelScorer(model, tok)
    agree(scorer.score(MIXED), truth(model, tok, MIXED), tolerance=1e-5 if dtype == torch.float32 else 0.05)
    assert scorer._shares is False
    [warning] = warnings
    assert "scores differ by" in warning


def test_a_body_that_fails_is_found(warnings):
    model, tok = reward_model(), tokenizer()
    expected = truth(model, tok, MIXED)

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["attention_mask"].dim() != 2:
            raise RuntimeError("masks have two dimensions\nhere")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    scorer = RewardModelScorer(model, tok, name="strict")
    agree(scorer.score(MIXED), expected)
    agree(scorer.score(MIXED), expected)
    assert warnings == [
        "Reward model `strict` computes the common prefix again for each text: it fails with RuntimeError: masks have "
        "two dimensions."
    ]


def test_attention_without_such_masks_is_named(warnings):
    model, tok = reward_model(), tokenizer()
    expected = truth(model, tok, MIXED)
    scorer = RewardModelScorer(model, tok)
    model.config._attn_implementation = "flash_attention_2"
    assert not scorer._may_share([], {})
    model.config._attn_implementation = "sdpa"
    agree(scorer.score(MIXED), expected)
    [warning] = warnings
    assert "'flash_attention_2' takes no mask" in warning


def test_models_without_such_a_head(warnings):
    config = tiny.config("llama", vocab_size=len(VOCABULARY), num_labels=1)
    scorer = RewardModelScorer(LlamaForCausalLM(config), tokenizer())
    assert not scorer._may_share([], {}) and not warnings
