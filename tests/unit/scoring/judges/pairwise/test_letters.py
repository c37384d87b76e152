"""Causal language models that answer A or B: tiny ones with random weights, in folders."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from support import tiny
from support.endpoint import comparison

SPECIAL = ["<pad>", "<bos>", "<unk>", "<user>", "<end>", "<assistant>", " ", "\n"]
WORDS = ["A", "B", "first", "second", "<turn>", "user", "assistant", "system", "[CONTEXT]", "[RESPONSE", "A]", "B]"]
# Llama 3's in small: it trims what it is given, and begins with BOS.
CHAT = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }} {% endif %}<{{ m.role }}> {{ m.content | trim }} <end> "
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# From the model card of RLHFlow/pair-preference-model-LLaMA3-8B.
PLAIN = (
    "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
    "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
)
OWN = "user {prompt} first {first} second {second}"
TALK = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
]
COMPARISONS = [
    comparison("w1 w2 w3", "w4", prompt="w5 w6"),
    comparison("w4", "w1 w2 w3", prompt="w5 w6"),
    comparison("w7", "w7", prompt="w8"),
    comparison("w9 w10 w11 w12 w13", "w14 w15 w16", prompt="w17"),
    comparison("w9", "w14 w15 w16", prompt=TALK),
]


def tokenizer(chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *tiny.WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")  # every space and line counts
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", chat_template=chat
    )


def folder(path, family="llama", chat: str | None = CHAT, **overrides):
    words = tokenizer(chat)
    model = tiny.causal_lm(family, vocab_size=len(words), max_position_embeddings=128, **overrides)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path, model, words


@torch.no_grad()
def p_first(model, words, text, letters=("A", "B")) -> float:
    ids = words.encode(text, add_special_tokens=False, return_tensors="pt")
    assert words.unk_token_id not in ids
    logits = model(ids).logits[0, -1].double()
    first, second = (logits[words.convert_tokens_to_ids(letter)].exp() for letter in letters)
    return float(first / (first + second))


def both_orders(one, write):
    a, b = (completion.text for completion in one.completions)
    return write(one.prompt.content, a, b), write(one.prompt.content, b, a)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_says_what_rlhflows_model_card_says(tmp_path, family, batch_size):
    path, model, words = folder(tmp_path / "judge", family)
    judge = PairwiseModelJudge.load(str(path), batch_size=batch_size)

    def write(prompt, a, b):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        context = words.apply_chat_template(messages, chat_template=PLAIN, tokenize=False)
        question = f"[CONTEXT] {context} [RESPONSE A] {a} [RESPONSE B] {b} \n"
        chat = words.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return chat.replace(words.bos_token, "")

    orders = [[p_first(model, words, text) for text in both_orders(one, write)] for one in COMPARISONS]
    assert judge.name == "judge"
    assert judge.prefer(COMPARISONS) == [pytest.approx((a + 1 - b) / 2, abs=1e-5) for a, b in orders]
    assert max(abs(a + b - 1) for a, b in orders) > 0.05 and judge.prefer(COMPARISONS[2:3]) == [0.5]


def test_each_text_costs_the_logits_of_one_token(tmp_path):
    path, _, words = folder(tmp_path / "judge")
    judge = PairwiseModelJudge.load(str(path), batch_size=8)
    shapes = []
    head = judge.model.get_output_embeddings()
    with head.register_forward_hook(lambda _head, _args, logits: shapes.append(tuple(logits.shape))):
        judge.prefer([comparison("w4 " * n, "w5", prompt="w6") for n in range(1, 5)])
    assert shapes == [(8, 1, len(words))]  # not one for each length, in each row


def test_a_template_and_letters_of_ones_own(tmp_path):
    path, model, words = folder(tmp_path / "judge")
    letters = ["first", "second"]
    judge = PairwiseModelJudge.load(str(path), template=OWN, letters=letters)

    def write(prompt, a, b):
        return f"<bos> <user> user {prompt} first {a} second {b} <end> <assistant>"

    orders = [[p_first(model, words, text, letters) for text in both_orders(one, write)] for one in COMPARISONS[:4]]
    assert judge.prefer(COMPARISONS[:4]) == [pytest.approx((a + 1 - b) / 2, abs=1e-5) for a, b in orders]


def test_without_a_chat_template_the_tokenizer_begins_the_text_its_way(tmp_path):
    path, model, words = folder(tmp_path / "judge", chat=None)
    judge = PairwiseModelJudge.load(str(path), template=OWN)

    def write(prompt, a, b):
        return f"<bos>user {prompt} first {a} second {b}"

    orders = [[p_first(model, words, text) for text in both_orders(one, write)] for one in COMPARISONS[:4]]
    assert judge.prefer(COMPARISONS[:4]) == [pytest.approx((a + 1 - b) / 2, abs=1e-5) for a, b in orders]
    with pytest.raises(ValueError, match="no chat template, which RLHFlow's format needs. Give the `template`"):
        PairwiseModelJudge.load(str(path))


def test_nothing_is_cut_off_and_dtypes_stay(tmp_path):
    words = tokenizer()
    tiny.causal_lm(vocab_size=len(words), max_position_embeddings=64).bfloat16().save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    judge = PairwiseModelJudge.load(str(tmp_path))
    assert judge.model.dtype == torch.bfloat16
    fits, longer = (comparison("w1" + " w1" * 12, "w2", prompt="w3" + blanks) for blanks in (" " * 10, " " * 11))
    assert [len(ids) for ids in judge.reader.token_ids([fits, longer])] == [64, 65]
    preferences = judge.prefer([fits, longer])
    assert preferences[0] is not None and preferences[1] is None and judge.metrics()["judge/too_long"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"letters": ["first", "third"]}, "The answer 'third' is not one token"),
        ({"letters": ["A B", "B"]}, "The answer 'A B' is not one token"),
        ({"letters": ["A", "A"]}, "`letters` must be two different answers"),
        ({"letters": ["A", "B", "C"]}, "`letters` must be two different answers"),
        ({"template": "{prompt} {first}"}, "The template has no place for {second}"),
        ({"max_tokens": 9}, "A causal language model as judge takes no `max_tokens`"),
        ({"batch_size": 0}, "`batch_size` must be 1 or more"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    path, *_ = folder(tmp_path / "judge")
    with pytest.raises(ValueError, match=message):
        PairwiseModelJudge.load(str(path), **options)
