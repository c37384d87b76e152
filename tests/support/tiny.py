"""Tiny real models and tokenizers, built in the test with random weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from online_dpo.types import Completion, Group, Prompt

WORDS = [f"w{i}" for i in range(39)] + ["abcdef"]  # the word that StopStringCriteria probes tokenizers with
SPECIAL = ["<pad>", "<eos>", "<end>", "<unk>"]
VOCABULARY = len(SPECIAL) + len(WORDS)
PAD, EOS, END = 0, 1, 2
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral")

CHAT_TEMPLATE = (
    "{% for m in messages %}<unk> {{ m['content'] }} "
    "{% if not loop.last or m['role'] == 'assistant' %}<end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w0 {% endif %}"
)


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<end>"],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def config(family: str, **overrides: object) -> PreTrainedConfig:
    common = dict(
        vocab_size=VOCABULARY, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None, tie_word_embeddings=True
    )
    if family == "gpt2":
        shape: dict = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
    else:
        shape = dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        )
    if family not in ("gpt2", "gpt_neox"):
        shape["num_key_value_heads"] = 2
    if family in ("qwen3", "gemma", "gemma2"):
        shape["head_dim"] = 8
    if family in ("mistral", "gemma2"):
        shape["sliding_window"] = 8
    classes = dict(
        gpt2=GPT2Config,
        gpt_neox=GPTNeoXConfig,
        llama=LlamaConfig,
        qwen2=Qwen2Config,
        qwen3=Qwen3Config,
        gemma=GemmaConfig,
        gemma2=Gemma2Config,
        mistral=MistralConfig,
    )
    return classes[family](**{**common, **shape, **overrides})


def attentions(family: str) -> list[str]:
    """Those that models of this family can be loaded with; soft caps have gone with SDPA until transformers 5.21."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config(family))]
    return ["sdpa", "eager"] if model._supports_sdpa else ["eager"]


def causal_lm(family: str = "llama", seed: int = 0, sharpness: float = 3.0, **overrides: object) -> PreTrainedModel:
    """Random weights, scaled up so that next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    cfg = config(family, **overrides)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(cfg)](cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(sharpness)
            elif "bias" not in name and sharpness != 1.0:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def checkpoint_layers(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    """Layers are computed again in the backward pass, as `Trainer` asks for; `transformers` 5.23 has renamed it."""
    new_name = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def prompts(lengths: Sequence[int], seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row, length in enumerate(lengths):
        ids = torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator).tolist()
        made.append(Prompt(" ".join(WORDS[i - len(SPECIAL)] for i in ids), tuple(ids), row))
    return made


def group(prompt: Prompt, completions: Sequence[Sequence[int]], finished: Sequence[bool] | None = None) -> Group:
    made = []
    for k, ids in enumerate(completions):
        stop = finished[k] if finished is not None else ids[-1] == EOS
        text = " ".join(WORDS[i - len(SPECIAL)] for i in ids if i >= len(SPECIAL))
        made.append(Completion(tuple(ids), (0.0,) * len(ids), "stop" if stop else "length", 0, text))
    return Group(prompt, tuple(made))
