"""Loading reward models: folders, adapters, and what is refused. Scores of a loaded model equal the saved one's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from online_dpo.scoring.protocols import PointwiseScorer
from online_dpo.scoring.rewards.loading import load_reward_model
from online_dpo.scoring.rewards.model import RewardModelScorer
from online_dpo.types import Completion, Group, Prompt

VOCABULARY = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *"abcdefgh"])}
SMALL = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tokenizer(form: str) -> PreTrainedTokenizerFast:
    """Letters are tokens. ``form`` is what the tokenizer adds to a text."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    added = [(token, VOCABULARY[token]) for token in form.split() if token != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=added)
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **own)


def llama(num_labels: int = 1) -> Any:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(**SMALL, num_labels=num_labels, max_position_embeddings=16)
    ).eval()


ASKED = [
    Group(Prompt(content, (1,), row=0), tuple(Completion((1,), (-1.0,), "stop", 0, text) for text in texts))
    for content, texts in (("ab", ("c", "def")), ("g", ("abc", "h")))
]


def test_folder_round_trip(tmp_path):
    model, tok = llama(), tokenizer("<s> $A")
    model.save_pretrained(tmp_path / "rm")
    tok.save_pretrained(tmp_path / "rm")
    loaded, loaded_tok = load_reward_model(str(tmp_path / "rm"))
    scorer = RewardModelScorer(loaded, loaded_tok)
    assert isinstance(scorer, PointwiseScorer) and scorer.name == "rm"
    assert scorer.score(ASKED) == RewardModelScorer(model, tok).score(ASKED)
    assert RewardModelScorer(loaded).score(ASKED) == scorer.score(ASKED), "the tokenizer is found by the model's path"
    assert load_reward_model(str(tmp_path / "rm"), tok)[1] is tok


def test_dtype_is_the_saved_one_or_the_given(tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_reward_model(str(tmp_path), tokenizer("<s> $A"))[0].score.weight.dtype == torch.bfloat16
    assert (
        load_reward_model(str(tmp_path), tokenizer("<s> $A"), dtype=torch.float32)[0].score.weight.dtype
        == torch.float32
    )


def test_heads_that_are_refused(tmp_path):
    for labels in (2, 3):
        llama(num_labels=labels).save_pretrained(tmp_path / "classes")
        with pytest.raises(ValueError, match=rf"one label.*it has `score.weight` of shape \({labels}, 16\)"):
            load_reward_model(str(tmp_path / "classes"), tokenizer("<s> $A"))
    LlamaForCausalLM(llama().config).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="no trained reward model: it has no weights for `score.weight`"):
        load_reward_model(str(tmp_path / "lm"), tokenizer("<s> $A"))


def test_folders_without_tokenizer(tmp_path):
    """Llama's loader fails there; Qwen's makes up an empty tokenizer."""
    llama().save_pretrained(tmp_path / "llama")
    qwen = Qwen2Config(**SMALL, num_key_value_heads=2, num_labels=1)
    Qwen2ForSequenceClassification(qwen).save_pretrained(tmp_path / "qwen")
    for name in ("llama", "qwen"):
        with pytest.raises(
            ValueError, match="comes without a tokenizer. Pass its tokenizer in `reward_processing_classes`"
        ):
            load_reward_model(str(tmp_path / name))


@pytest.mark.parametrize("headless_base", [False, True])
def test_adapter_round_trip(tmp_path, headless_base):
    from peft import LoraConfig, TaskType, get_peft_model

    tok, other = tokenizer("<s> $A"), tokenizer("<s> $A </s>")
    other.chat_template = TEMPLATE
    base = llama()
    saved_base = LlamaForCausalLM(base.config) if headless_base else base
    saved_base.save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    fresh = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(fresh, lora).eval()
    model.save_pretrained(tmp_path / "adapter")

    loaded, loaded_tok = load_reward_model(str(tmp_path / "adapter"))
    truth = RewardModelScorer(model, tok).score(ASKED)
    assert RewardModelScorer(loaded, loaded_tok).score(ASKED) == truth
    with model.disable_adapter():
        assert not torch.allclose(
            torch.tensor(RewardModelScorer(model, tok).score(ASKED)), torch.tensor(truth), atol=1e-3
        )
    assert loaded_tok.chat_template is None, "the base model's"
    other.save_pretrained(tmp_path / "adapter")
    assert load_reward_model(str(tmp_path / "adapter"))[1].chat_template == TEMPLATE, "the adapter's own"


def test_adapter_with_more_labels(tmp_path):
    from peft import LoraConfig, TaskType, get_peft_model

    base = LlamaForCausalLM(llama().config)
    base.save_pretrained(tmp_path / "base")
    three = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"])
    get_peft_model(three, lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"(?s)adapter` must have a head with one label.*\[3, 16\]"):
        load_reward_model(str(tmp_path / "adapter"), tokenizer("<s> $A"))
