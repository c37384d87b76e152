"""Scores from rows in which texts share their beginning. The truth is ``model(ids).logits`` of one text."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tokenizers import processors

from online_dpo.modeling.attention.choice import use_flex_attention
from online_dpo.scoring.rewards.model import RewardModelScorer
from support import tiny
from support.shared_prefix import (
    EOS,
    MIXED,
    OTHERS,
    ROOM,
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


@pytest.mark.parametrize("batch_size", [3, 16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scores_equal_those_of_single_texts(family, batch_size, warnings):
    model, tok = reward_model(family), tokenizer()
    expected = truth(model, tok, MIXED)
    seen = Seen(model)
    scorer = RewardModelScorer(model, tok, batch_size=batch_size)
    first = scorer.score(MIXED)
    agree(first, expected)
    assert first[-1][0] == first[-1][2] == first[-1][3] != first[-1][1], "equal texts tie"
    assert scorer._shares and not warnings
    before = len(seen.plain)
    assert scorer.score(MIXED) == first
    assert len(seen.plain) == before, "no text is scored by itself once the check has passed"
    assert torch.tensor(list(itertools.chain(*expected))).std() > 0.05, "scores that hardly differ would show nothing"


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_scores_through_flex_attention_come_from_one_row(family, warnings):
    model, tok = reward_model(family), tokenizer()
    expected = truth(model, tok, MIXED)
    scorer, lengths = RewardModelScorer(model, tok), []
    use_flex_attention(model)
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: lengths.append(tuple(args[0].shape)))
    agree(scorer.score(MIXED), expected)
    assert scorer._shares and not warnings
    assert [shape for shape in lengths if shape[1] % 128 == 0] and all(r == 1 for r, t in lengths if t % 128 == 0)


def test_scores_go_through_sdpa_where_flex_attention_fails(warnings):
    model, tok = reward_model("gpt2"), tokenizer()  # it reads no block masks
    expected = truth(model, tok, MIXED)
    scorer = RewardModelScorer(model, tok)
    use_flex_attention(model)
    agree(scorer.score(MIXED), expected)
    [told] = [w for w in warnings if "FlexAttention" in w]
    assert "is read through SDPA, not FlexAttention: it fails with" in told and scorer._shares


@pytest.mark.parametrize(
    "family,implementation", [(f, a) for f in ("llama", "gpt2", "gemma2") for a in tiny.attentions(f)]
)
def test_both_attention_implementations(family, implementation, warnings):
    model, tok = reward_model(family, attn_implementation=implementation), tokenizer()
    agree(RewardModelScorer(model, tok).score(MIXED), truth(model, tok, MIXED))
    assert not warnings


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_rows_longer_than_the_model_has_positions(family):
    model, tok = reward_model(family), tokenizer()
    groups = [group(letters(90, seed=1), *(letters(30, seed=10 + k) for k in range(6)))]
    seen = Seen(model)
    agree(RewardModelScorer(model, tok).score(groups), truth(model, tok, groups))
    assert max(length for _, length in seen.shared) > ROOM == model.config.max_position_embeddings


@pytest.mark.parametrize("pad", [EOS, None, -1])
def test_other_padding_tokens(pad, warnings):
    """A head whose padding token is EOS scores the token before it, in shared rows as well."""
    model, tok = reward_model(pad_token_id=pad), tokenizer(pad_token="</s>")
    scorer = RewardModelScorer(model, tok)
    agree(scorer.score(MIXED), truth(model, tok, MIXED))
    assert scorer._shares and not warnings


@pytest.mark.parametrize("family", OTHERS)
def test_other_decoders(family, warnings):
    """Positions that begin elsewhere and a projection before the head; biases; experts; two kinds of layers."""
    model, tok = sharpened(OTHERS[family]), tokenizer()
    scorer = RewardModelScorer(model, tok)
    agree(scorer.score(MIXED), truth(model, tok, MIXED))
    assert scorer._shares and not warnings


def test_tokens_that_merge_across_the_boundary():
    """``...x`` goes on as ``xyz``, ``xy`` and ``x``: three tokens in the place of the prompt's last."""
    model, tok = reward_model(), tokenizer()
    groups = [group(letters(15, seed=1) + "x", "yzab", "yab", "ab", "b"), group("x", "yz", "ya", "a")]
    expected = truth(model, tok, groups)
    seen = Seen(model)
    scorer = RewardModelScorer(model, tok)
    agree(scorer.score(groups), expected)
    seen.shared.clear()
    scorer.score(groups[:1])
    # BOS and 15 letters; then `xyz a b`, `xy a b`, `x a b`, `x b`, and EOS behind each
    assert seen.shared == [(1, 16 + 4 + 4 + 4 + 3)]


def test_texts_of_one_token_and_texts_that_begin_others():
    tok = tokenizer(bos_token=None)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    model = reward_model()
    prompt = letters(10, seed=1)
    groups = [group(prompt, "", "a", "ab", "abc", ended=False), group("", "a", "bc", "d", ended=False)]
    agree(RewardModelScorer(model, tok).score(groups), truth(model, tok, groups))


def test_texts_that_are_nothing_but_padding():
    model, tok = reward_model(pad_token_id=EOS), tokenizer(pad_token="</s>", bos_token=None)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    groups = [group("", "", ended=True), group(letters(10, seed=1), "", "a", "ab")]
    agree(RewardModelScorer(model, tok).score(groups), truth(model, tok, groups))


def test_truncated_texts_share_what_is_left_in_common():
    tok = tokenizer()
    tok.model_max_length = 28
    model = reward_model()
    prompt = letters(26, seed=1)
    groups = [group(prompt, "a", "ab"), group(prompt, "abcd", "bcde"), group("short prompt", *answers(3, seed=2))]
    scorer = RewardModelScorer(model, tok)
    expected = truth(model, tok, groups)
    agree(scorer.score(groups), expected)
    assert scorer.truncated == 4
    seen = Seen(model)
    scorer.score(groups[1:2])
    assert seen.shared == [(1, 1 + 22 + 5 + 5)], "BOS, what four letters and EOS leave of the prompt, and twice those"
    scorer.score(groups[:1])
    assert seen.plain == [(2, 28)], "cut at different places, they have only BOS in common"


def test_bfloat16_agrees_within_rounding(warnings):
    model, tok = reward_model().to(torch.bfloat16), tokenizer()
    expected = torch.tensor(list(itertools.chain(*truth(model, tok, MIXED))))
    scorer = RewardModelScorer(model, tok)
    found = torch.tensor(list(itertools.chain(*scorer.score(MIXED))))
    assert scorer._shares and not warnings
    assert (found - expected).abs().mean() < 0.03 * expected.abs().mean()


@pytest.mark.parametrize("trained_head", [False, True])
def test_adapters(trained_head, warnings):
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        modules_to_save=["score"] if trained_head else None,
    )  # fmt: skip
    tok, model = tokenizer(), get_peft_model(reward_model(), lora).eval()
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.mul_(-0.5)  # PEFT keeps it for SEQ_CLS anyway
    expected = truth(model, tok, MIXED)
    scorer = RewardModelScorer(model, tok)
    agree(scorer.score(MIXED), expected)
    assert scorer._shares and not warnings
    with model.disable_adapter():
        off = truth(model, tok, MIXED)
        agree(scorer.score(MIXED), off)
    assert abs(off[0][0] - expected[0][0]) > 1e-2


def test_nan_stays_where_it_belongs(warnings):
    """In a shared row it reaches every text behind it: 0 times nan is nan."""
    model, tok = reward_model(), tokenizer()
    scorer = RewardModelScorer(model, tok)
    scorer.score(MIXED)
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCABULARY["9"]] = math.nan
    groups = [group(letters(20, seed=1), "a9", "abcd", "b"), group(letters(15, seed=2), "ab", "c")]
    found, expected = scorer.score(groups), truth(model, tok, groups)
    assert math.isnan(found[0][0]) and math.isnan(expected[0][0])  # pyright: ignore
    agree([found[0][1:], found[1]], [expected[0][1:], expected[1]])
    assert not warnings


def test_half_precision_scores_come_as_floats():
    model, tok = reward_model().to(torch.bfloat16), tokenizer()
    [scores] = RewardModelScorer(model, tok).score(MIXED[:1])
    assert all(isinstance(score, float) for score in scores)
    assert model.training is False and all(parameter.grad is None for parameter in model.parameters())
