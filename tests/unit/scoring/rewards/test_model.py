"""Reward models: the tokens they read, batches against single texts, refusals. The truth is ``model(ids).logits``."""

from __future__ import annotations

import copy
import math
import string
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from online_dpo.errors import ScoringError
from online_dpo.modeling.memory import DoesNotFit
from online_dpo.scoring.rewards.model import RewardModelScorer
from online_dpo.types import Completion, Group, Prompt

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[CLS]", "[SEP]", "<user>", "<assistant>", "<system>", "<end>"]
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *string.ascii_lowercase, *string.digits])}
BOS, EOS, PAD, CLS, SEP = (VOCABULARY[token] for token in ("<s>", "</s>", "<pad>", "[CLS]", "[SEP]"))
TEMPLATE = (
    "<s>{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.name is defined %}0{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ROOM = 24


def tokenizer(form: str | None = None, **special: Any) -> PreTrainedTokenizerFast:
    """Letters are tokens. ``form`` is what the tokenizer adds to a text, such as ``<s> $A``."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if form is not None:
        added = [(token, VOCABULARY[token]) for token in form.split() if token != "$A"]
        backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=added)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        extra_special_tokens=["<user>", "<assistant>", "<system>", "<end>"],
        **({"bos_token": "<s>", "eos_token": "</s>"} | special),
    )
    assert len(made) == len(VOCABULARY)
    return made


def shaken(kind: Any, config: Any) -> Any:
    """A model with larger random weights than fresh ones, with which every text would score nearly the same."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def llama(**options: Any) -> LlamaForSequenceClassification:
    config = LlamaConfig(**SMALL, intermediate_size=16, max_position_embeddings=ROOM, **({"num_labels": 1} | options))
    return shaken(LlamaForSequenceClassification, config)


def gpt2(**options: Any) -> GPT2ForSequenceClassification:
    sizes = {"vocab_size": len(VOCABULARY), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": ROOM}
    config = GPT2Config(**sizes, bos_token_id=EOS, eos_token_id=EOS, num_labels=1, **options)
    return shaken(GPT2ForSequenceClassification, config)


def bert(pad_token_id: int = PAD) -> BertForSequenceClassification:
    sizes = {**SMALL, "intermediate_size": 16, "max_position_embeddings": ROOM}
    return shaken(BertForSequenceClassification, BertConfig(**sizes, num_labels=1, pad_token_id=pad_token_id))


def ids(text: str, *before: int) -> list[int]:
    return [*before, *(VOCABULARY[letter] for letter in text)]


def group(content, *answers: tuple[str, str]) -> Group:
    """``answers``: text and finish reason."""
    completions = tuple(Completion((99,), (-1.0,), reason, 0, text) for text, reason in answers)  # pyright: ignore
    return Group(Prompt(content, (98,), row=0), completions)


def alone(model: Any, tokens: list[int]) -> float:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits.item()


def recorded(model: Any) -> list[list[int]]:
    """The rows without padding that the model is given from now on."""
    rows: list[list[int]] = []

    def keep(module, args, kwargs):
        for row, mask in zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), strict=True):
            assert sorted(mask, reverse=True) == mask, "padding stands on the right"
            rows.append(row[: sum(mask)])

    model.register_forward_pre_hook(keep, with_kwargs=True)
    return rows


def rows_for(tok: PreTrainedTokenizerFast, *groups: Group, model: Any = None) -> list[list[int]]:
    """The token rows in the order of the completions."""
    model = model or llama()
    rows = recorded(model)
    scorer = RewardModelScorer(model, tok, batch_size=1)
    for g in groups:
        for completion in g.completions:
            scorer.score([Group(g.prompt, (completion,))])
    return rows


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_text_gets_bos_once_and_eos_only_if_it_ended():
    asked = group("hi", ("ab", "stop"), ("cd", "length"), ("", "stop"))
    for form in ("<s> $A", "<s> $A </s>"):
        assert rows_for(tokenizer(form), asked) == [ids("hiab", BOS) + [EOS], ids("hicd", BOS), ids("hi", BOS) + [EOS]]


def test_bos_written_in_the_prompt_is_not_doubled():
    assert rows_for(tokenizer("<s> $A"), group("<s>hi", ("a", "length"))) == [ids("hia", BOS)]
    assert rows_for(tokenizer(), group("<s>hi", ("a", "length"))) == [ids("hia", BOS)]
    assert rows_for(tokenizer(), group("hi", ("a", "length"))) == [ids("hia")]


def test_separator_of_an_encoder_stays_when_cut():
    own = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "<pad>"}
    asked = group("hi", ("a", "stop"), ("b", "length"))
    for ends in ({"bos_token": None, "eos_token": None}, {"bos_token": "[CLS]", "eos_token": "[SEP]"}):
        rows = rows_for(tokenizer("[CLS] $A [SEP]", **own, **ends), asked, model=bert())
        assert rows == [ids("hia", CLS) + [SEP], ids("hib", CLS) + [SEP]]


def test_conversation_goes_through_the_chat_template():
    tok = tokenizer("<s> $A </s>")
    tok.chat_template = TEMPLATE
    user, assistant, system, end = (VOCABULARY[t] for t in ("<user>", "<assistant>", "<system>", "<end>"))
    talk = [{"role": "system", "content": "s", "name": None}, {"role": "user", "content": "hi", "name": "al"}]
    began = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "we"}]
    rows = rows_for(tok, group(talk, ("ab", "stop")), group(began, ("ll", "length")))
    name = VOCABULARY["0"]
    assert rows == [
        [BOS, system, *ids("s"), end, user, *ids("hi"), name, end, assistant, *ids("ab"), end],
        [BOS, user, *ids("hi"), end, assistant, *ids("well"), end],
    ]
    assert talk[0] == {"role": "system", "content": "s", "name": None} and began[1]["content"] == "we"


@pytest.mark.smoke
def test_text_and_conversation_in_one_call():
    tok = tokenizer("<s> $A")
    tok.chat_template = TEMPLATE
    model = llama()
    talk = [{"role": "user", "content": "b"}]
    scores = RewardModelScorer(model, tok).score([group("a", ("x", "stop")), group(talk, ("y", "stop"))])
    user, assistant, end = (VOCABULARY[t] for t in ("<user>", "<assistant>", "<end>"))
    assert scores[0][0] == pytest.approx(alone(model, [BOS, *ids("ax"), EOS]), abs=1e-5)
    expected = alone(model, [BOS, user, *ids("b"), end, assistant, *ids("y"), end])
    assert scores[1][0] == pytest.approx(expected, abs=1e-5)


def test_conversation_without_template():
    scorer = RewardModelScorer(llama(), tokenizer(), name="judge-8b")
    with pytest.raises(ValueError, match="reward model `judge-8b` has no chat template.*reward_processing_classes"):
        scorer.score([group([{"role": "user", "content": "hi"}], ("a", "stop"))])
    with pytest.raises(ValueError, match="no chat template"):
        scorer.check_chat_template()


def test_left_truncation():
    long = string.ascii_lowercase  # 26 letters; with BOS, one letter and EOS 29 tokens for 24 places
    tok = tokenizer("<s> $A")
    asked = [group(long, ("x", "stop")), group("short", ("x", "stop"))]
    assert rows_for(tok, *asked)[0] == ids("fghijklmnopqrstuvwxyz" + "x", BOS) + [EOS]
    assert rows_for(tokenizer(), *asked)[0] == ids("efghijklmnopqrstuvwxyz" + "x") + [EOS]
    tok.model_max_length = 5
    model = llama()
    scorer = RewardModelScorer(model, tok)
    scores = scorer.score(asked)
    assert scorer.truncated == 2
    assert scores[0][0] == pytest.approx(alone(model, [BOS, *ids("yzx"), EOS]), abs=1e-5)
    assert scores[1][0] == pytest.approx(alone(model, [BOS, *ids("rtx"), EOS]), abs=1e-5)
    scorer.score(asked[1:])
    assert scorer.truncated == 3
    tok.model_max_length = 1
    assert rows_for(tok, asked[0]) == [[BOS]]


def test_encoder_keeps_cls_when_truncated():
    tok = tokenizer("[CLS] $A [SEP]", bos_token=None, eos_token=None, cls_token="[CLS]", sep_token="[SEP]")
    tok.model_max_length = 4
    assert rows_for(tok, group("abc", ("d", "stop")), model=bert()) == [[CLS, *ids("cd"), SEP]]


# --- numbers --------------------------------------------------------------------------------------------------------

ASKED = [
    group("hi", ("abc", "stop"), ("a", "stop"), ("", "length")),
    group("you", ("xyzxyzxyz", "length"), ("q", "length"), ("a", "stop")),
    group("p", ("0123", "stop"), ("4", "length"), ("abcdefgh", "stop")),
]


def expected_rows(before: list[int], after: dict[str, list[int]]) -> list[list[list[int]]]:
    return [
        [before + ids(g.prompt.content + c.text) + after[c.finish_reason] for c in g.completions]  # pyright: ignore
        for g in ASKED
    ]


CASES = {
    "llama, pad of its own": (llama, PAD, "<pad>", False),
    "llama, pad is eos": (llama, EOS, "</s>", False),
    "llama, no pad in the config": (llama, None, "<pad>", False),
    "llama, no pad at all": (llama, None, None, False),
    "llama, pad is eos, none in the config": (llama, None, "</s>", False),
    "llama, pad outside the vocabulary": (llama, -1, None, False),
    "gpt2, pad of its own": (gpt2, PAD, "<pad>", False),
    "gpt2, pad is eos": (gpt2, EOS, "</s>", False),
    "gpt2, no pad": (gpt2, None, None, False),
    "bert": (bert, PAD, "<pad>", True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_batches_equal_single_texts(case, batch_size):
    build, config_pad, pad_token, encoder = CASES[case]
    if encoder:
        own = {"bos_token": None, "eos_token": None, "cls_token": "[CLS]", "sep_token": "[SEP]"}
        tok = tokenizer("[CLS] $A [SEP]", **own, pad_token=pad_token)
        rows = expected_rows([CLS], {"stop": [SEP], "length": [SEP]})
    else:
        tok = tokenizer("<s> $A", **({} if pad_token is None else {"pad_token": pad_token}))
        rows = expected_rows([BOS], {"stop": [EOS], "length": []})
    model = build(pad_token_id=config_pad)
    truth = [[alone(model, row) for row in group_rows] for group_rows in rows]
    scores = RewardModelScorer(model, tok, batch_size=batch_size).score(ASKED)
    assert torch.allclose(torch.tensor(scores), torch.tensor(truth), atol=1e-5, rtol=0)
    assert torch.tensor(truth).std() > 0.05, "scores that hardly differ would show nothing"


def test_texts_that_end_in_the_padding_token_itself():
    """Every completion ended, so every row truly ends in the token that also pads."""
    asked = [group("hi", ("a", "stop"), ("abcdef", "stop")), group("you", ("", "stop"), ("xyz", "stop"))]
    for pad in (EOS, None):
        model = llama(pad_token_id=pad)
        truth = [[alone(model, [BOS, *ids(g.prompt.content + c.text), EOS]) for c in g.completions] for g in asked]  # pyright: ignore
        scores = RewardModelScorer(model, tokenizer("<s> $A", pad_token="</s>")).score(asked)
        assert torch.allclose(torch.tensor(scores), torch.tensor(truth), atol=1e-5, rtol=0)
        # With EOS as the padding token, the model itself scores the token before it.
        before_eos = alone(llama(pad_token_id=None), [BOS, *ids("hia")])
        assert (truth[0][0] == pytest.approx(before_eos, abs=1e-5)) is (pad == EOS)


def test_equal_texts_are_computed_once_and_tie():
    model = llama()
    rows = recorded(model)
    scores = RewardModelScorer(model, tokenizer("<s> $A")).score(
        [group("hi", ("a", "stop"), ("b", "stop"), ("a", "stop"))]
    )
    assert len(rows) == 2 and scores[0][0] == scores[0][2] != scores[0][1]


def test_longest_texts_together():
    model = llama()
    rows = recorded(model)
    RewardModelScorer(model, tokenizer(), batch_size=2).score(
        [group("p", ("a", "length"), ("bcd", "length"), ("ef", "length"))]
    )
    assert rows == [ids("pbcd"), ids("pef"), ids("pa")]


def test_half_precision_logits_come_as_floats():
    model = llama().to(torch.bfloat16)
    [[score]] = RewardModelScorer(model, tokenizer("<s> $A")).score([group("hi", ("a", "length"))])
    with torch.no_grad():
        assert score == model(torch.tensor([ids("hia", BOS)])).logits.float().item()


def test_nan_passes_through():
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCABULARY["z"]] = math.nan
    [[good, bad]] = RewardModelScorer(model, tokenizer("<s> $A"), batch_size=1).score(
        [group("hi", ("a", "stop"), ("z", "stop"))]
    )
    assert good is not None and math.isfinite(good) and bad is not None and math.isnan(bad)


def test_nothing_of_the_users_changes():
    model = llama(pad_token_id=None).train()
    tok = tokenizer("<s> $A </s>")
    config, state = copy.deepcopy(model.config.to_dict()), copy.deepcopy(tok.__dict__ | {"_tokenizer": None})
    backend = tok.backend_tokenizer.to_str()
    RewardModelScorer(model, tok).score(ASKED)
    assert model.config.to_dict() == config
    assert tok.backend_tokenizer.to_str() == backend and tok.pad_token is None
    assert (tok.__dict__ | {"_tokenizer": None}).keys() == state.keys() and tok.padding_side == state["padding_side"]
    assert model.training and all(p.grad is None for p in model.parameters())


def test_config_is_restored_when_the_model_fails():
    model = llama(pad_token_id=None)
    model.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(DoesNotFit, match=r"ran out of memory with 1 at a time \(full\)\. Lower .*`reward_batch_size`"):
        RewardModelScorer(model, tokenizer()).score(ASKED)
    assert model.config.pad_token_id is None and model.config.use_cache is True


def test_dropout_is_off():
    model = llama(attention_dropout=0.9)
    scorer = RewardModelScorer(model, tokenizer())
    first = scorer.score(ASKED)
    model.train()
    assert scorer.score(ASKED) == first


def test_prepare_is_called_once_and_its_model_is_run():
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            output = self.inner(**inputs)
            output.logits = 2 * output.logits
            return output

    model, calls = llama(), []
    plain = RewardModelScorer(model, tokenizer()).score(ASKED)
    doubled = RewardModelScorer(model, tokenizer(), prepare=lambda m: calls.append(m) or Doubled(m)).score(ASKED)
    assert calls == [model]
    assert torch.allclose(torch.tensor(doubled), 2 * torch.tensor(plain))


def test_attention_is_chosen_for_the_device_that_the_model_is_moved_to():
    on_cpu, moved = llama(), llama()
    RewardModelScorer(on_cpu, tokenizer())
    RewardModelScorer(moved, tokenizer(), prepare=lambda model: model.to("meta"))
    chosen = [model.config._attn_implementation for model in (on_cpu, moved)]
    assert chosen == ["online_dpo_segments", "sdpa"]  # segments are for CPUs


# --- refusals -------------------------------------------------------------------------------------------------------


def test_refused_models():
    with pytest.raises(ValueError, match=r"one label \(num_labels=1\); it has 3"):
        RewardModelScorer(llama(num_labels=3), tokenizer())
    with pytest.raises(TypeError, match="Linear has no `config`. Wrap it in a reward function"):
        RewardModelScorer(nn.Linear(2, 1), tokenizer())
    with pytest.raises(
        ValueError, match="`LlamaForSequenceClassification` comes without a tokenizer.*reward_processing_"
    ):
        RewardModelScorer(llama())


def test_logits_of_another_shape():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16, num_labels=1))
    with pytest.raises(ScoringError, match=r"`policy` returned logits of shape \(1, 4, 46\) for 1 texts"):
        RewardModelScorer(model, tokenizer("<s> $A"), name="policy").score([group("hi", ("a", "length"))])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(""), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("share", [True, False])
def test_where_memory_runs_out_the_batch_is_halved_and_the_scores_stay(error, share, caplog):
    """Rows that share a prompt are larger than all of their texts alone: then these are computed apart."""
    long = "abcdefgh"
    groups = [group(long, ("abc", "stop"), ("xy", "stop"), ("q", "length"), ("", "stop")), *ASKED]
    expected = RewardModelScorer(llama(), tokenizer(), share_prompts=share).score(groups)
    model, sizes = llama(), []

    def room(module, args, kwargs):
        rows = (args[0] if args else kwargs["input_ids"]).shape
        if rows[0] > 3 or rows[1] > 16:
            raise error
        sizes.append(rows[0])

    model.model.register_forward_pre_hook(room, with_kwargs=True)
    scorer = RewardModelScorer(model, tokenizer(), name="rm", share_prompts=share)
    assert scorer.score(groups) == [pytest.approx(row, rel=1e-5, abs=1e-5) for row in expected]
    assert max(sizes) <= 3
    told = [record.getMessage() for record in caplog.records if "ran out of memory" in record.getMessage()]
    assert len(told) <= 3 and all(
        text.startswith("Reward model `rm` ran out of memory") and "; it goes on with" in text for text in told
    )
    caplog.clear()
    scorer.score(groups)
    assert not caplog.records
