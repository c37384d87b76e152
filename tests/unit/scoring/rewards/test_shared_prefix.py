"""Scores from rows in which texts share their beginning. The truth is ``model(ids).logits`` of one text."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import string
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.packing.prefix_tree import Tree
from online_dpo.scoring.registry import build_scorers
from online_dpo.scoring.rewards.model import RewardModelScorer
from online_dpo.scoring.rewards.shared_prefix import group_trees, passes
from online_dpo.types import Completion, Group, Prompt
from support import tiny

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<user>", "<assistant>"]
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *string.ascii_lowercase, *string.digits, "xy", "xyz"])}
BOS, EOS, PAD = 1, 2, 3
TEMPLATE = "<s>{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
ROOM = 128
LOGGER = "online_dpo.scoring.rewards.shared_prefix"


def tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """Letters are tokens, but ``xy`` and ``xyz`` are one token each; BOS stands before every text."""
    backend = Tokenizer(models.BPE(VOCABULARY, [("x", "y"), ("xy", "z")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | special
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=["<user>", "<assistant>"], chat_template=TEMPLATE, **own
    )
    assert len(made) == len(VOCABULARY)
    return made


def reward_model(family: str = "llama", **options: Any) -> Any:
    """Random weights, scaled up so that scores are far from each other."""
    own: dict[str, Any] = {"vocab_size": len(VOCABULARY), "num_labels": 1, "pad_token_id": PAD, "eos_token_id": EOS}
    return sharpened(tiny.config(family, **(own | options)))


def sharpened(config: Any) -> Any:
    torch.manual_seed(0)
    model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
            elif "bias" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def letters(length: int, seed: int) -> str:
    picks = torch.randint(24, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return "".join(string.ascii_lowercase[i] for i in picks)  # neither y nor z, so nothing merges by chance


def group(content: Any, *answers: str, ended: bool = True) -> Group:
    reason = "stop" if ended else "length"
    return Group(Prompt(content, (98,), row=0), tuple(Completion((99,), (-1.0,), reason, 0, text) for text in answers))


def answers(count: int, seed: int) -> list[str]:
    return [letters(3 + (5 * k + seed) % 17, seed=1000 * seed + k) for k in range(count)]


def talk(length: int, seed: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": letters(length, seed)}]


def truth(model: Any, tok: Any, groups: Sequence[Group]) -> list[list[float]]:
    """Each text by itself, through the model's own forward."""
    plain = RewardModelScorer(model, tok, share_prompts=False)
    texts = iter(plain._token_ids([(group.prompt, answer) for group in groups for answer in group.completions]))
    with torch.no_grad():
        return [[model(torch.tensor([next(texts)])).logits.item() for _ in group.completions] for group in groups]


def agree(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for found_K, expected_K in zip(found, expected, strict=True):
        assert found_K == pytest.approx(expected_K, abs=tolerance, rel=tolerance)


class Seen:
    """Shapes of the rows that a model's body is given from now on: those with a mask of their own, and padded ones."""

    def __init__(self, model: Any) -> None:
        self.shared: list[tuple[int, int]] = []
        self.plain: list[tuple[int, int]] = []
        model.base_model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: Any, kwargs: Any) -> None:
        mask = kwargs["attention_mask"]
        if mask is not None:  # as it is for a text that a test gives to the model
            padded = torch.is_tensor(mask) and mask.dim() == 2
            (self.plain if padded else self.shared).append(tuple((args[0] if args else kwargs["input_ids"]).shape))


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Warnings that sharing makes, as they come."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger(LOGGER).addHandler(handler)
    yield said
    logging.getLogger(LOGGER).removeHandler(handler)


# --- equal scores ---------------------------------------------------------------------------------------------------

MIXED = [
    group(letters(40, seed=1), *answers(5, seed=1)),
    group(letters(9, seed=2), *answers(5, seed=2), ended=False),
    group(letters(70, seed=3), *answers(2, seed=3)),
    group(talk(20, seed=4), *answers(5, seed=4)),
    group(talk(55, seed=5), *answers(2, seed=5)),
    group("a", *answers(3, seed=6)),  # nothing worth sharing
    group(letters(12, seed=7), "same", "other", "same", "same"),
]


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


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": ROOM}
OWN = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "eos_token_id": EOS, "num_labels": 1}
OTHERS = {
    "opt": OPTConfig(**OWN, **SIZES, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi": PhiConfig(**OWN, **SIZES, intermediate_size=48),
    "mixtral": MixtralConfig(**OWN, **SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4),
    "gemma3": Gemma3TextConfig(**OWN, **SIZES, intermediate_size=48, head_dim=8, num_key_value_heads=2),
}


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


# --- shared indeed --------------------------------------------------------------------------------------------------


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


# --- not shared -----------------------------------------------------------------------------------------------------


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


# --- numbers that are none ------------------------------------------------------------------------------------------


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
