"""Small tokenizers with the decoders of well-known model families, made in the test."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "The mouse said: don't eat t11 and t13, t12! Is it unable? naïve café, déjà vu; 日本語 and 🙂🙃. "
    "a question, an answer, the end abcdef"
)
KINDS = ("llama2", "gpt2", "wordpiece", "unigram", "suffix")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ ' ' + m['content'] }}</s>{% endif %}{% endfor %}"
)
"""As Llama 2 writes it: a space before an answer, and nothing in a generation prompt."""


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Its decoder is that of Llama 2 and Mistral (strips the first space, bytes for unknown characters), of GPT-2 and
    Qwen (all is bytes), of BERT (``##`` joins, else a space), of T5 and Gemma (``▁``, stripped at the beginning), or of
    GPT-1 (words end in ``</w>``).
    """
    made = {"llama2": _llama2, "gpt2": _gpt2, "wordpiece": _wordpiece, "unigram": _unigram, "suffix": _suffix}[kind]()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=CHAT_TEMPLATE
    )


def _llama2() -> Tokenizer:
    pieces = trainers.BpeTrainer(vocab_size=180, show_progress=False, special_tokens=["<unk>"])
    learned = Tokenizer(models.BPE())
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned.normalizer = spaces
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learned.train_from_iterator([TEXT] * 3, pieces)
    state = json.loads(learned.to_str())["model"]
    plain = {token for token in state["vocab"] if token.replace("▁", "").isascii()}  # other characters are bytes
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(plain - {"<unk>"})]
    merges = [(a, b) for a, b in state["merges"] if {a, b, a + b} <= plain]
    made = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = spaces
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def _gpt2() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def _wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    made.train_from_iterator(
        [TEXT] * 3, trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"], show_progress=False)
    )
    return made


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.train_from_iterator(
        [TEXT] * 3,
        trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    )
    return made


def _suffix() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    made.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False),
    )
    return made
