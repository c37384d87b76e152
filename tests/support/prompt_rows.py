"""Tokenizers of words and of bytes, messages, and rows that are prepared as prompts."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.prompts import prepare_prompts

SPECIAL = ["<unk>", "<s>", "</s>", "<user>", "<bot>"]
WORDS = ["a", "b", "c", "d", "e", "Human", "Assistant", ":"]
ID = {token: i for i, token in enumerate(SPECIAL + WORDS)}
CHAT = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }} {{ m.content }}"
    "{% if not loop.last %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% if thinking %} e{% endif %}{% endif %}"
    "{% if tools %} {{ tools[0].name }}{% endif %}"
    "{% if messages[-1].role == 'system' %}{{ raise_exception('no system message last') }}{% endif %}"
)


def ids(*tokens):
    return [ID[token] for token in tokens]


def word_tokenizer(adds="$A", chat_template=None):
    """One token a word; ``adds`` is the template of what the tokenizer puts around a text."""
    backend = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds != "$A":
        backend.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[(token, ID[token]) for token in ("<s>", "</s>")]
        )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = chat_template
    return fast


def byte_tokenizer(adds_bos):
    """Byte-level BPE without merges: any text, one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def arguments(tmp="unused", **kwargs):
    return OnlineDPOConfig(output_dir=tmp, use_cpu=True, report_to="none", **kwargs)


def user(content):
    return {"role": "user", "content": content}


def system(content):
    return {"role": "system", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def yield_rows(rows):
    yield from rows


def prepare(rows, tokenizer, **kwargs):
    prepared, left_out = prepare_prompts(rows, tokenizer, arguments(**kwargs))
    return list(prepared), left_out
