"""Tokens of prompts: what stands around a text, chat templates, and what is cut."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset, IterableDataset
from transformers import ByT5Tokenizer

from online_dpo.data.collate import collate_prompts, prompts_from_batch
from online_dpo.data.cut import cut_message
from online_dpo.data.tokens import tokenize_text, truncate_left
from online_dpo.errors import InvalidPromptError
from support.prompt_rows import CHAT, arguments, assistant, ids, prepare, system, user, word_tokenizer

# prompts that are too long --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [False, True])
def test_prompts_that_were_cut_are_marked_and_told_with_what_to_set(messages, shape, caplog):
    texts = ["a b c", "a b c d e f g h", "a b"]
    rows = [{"prompt": [user(text)] if messages else text} for text in texts]
    tokenizer = word_tokenizer(chat_template=CHAT if messages else None)
    prepared, _ = prepare(shape(rows), tokenizer, max_length=14, max_new_tokens=8)
    assert [row["prompt_cut"] for row in prepared] == [False, True, False]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if isinstance(shape(rows), IterableDataset):  # it is told of while it is read, see SayCutPrompts
        assert told == []
    else:
        assert told == [
            "train_dataset: 1 of 3 prompts are longer than 6 tokens, which is `max_length` (14) - `max_new_tokens` "
            "(8); they are cut on the left. Raise `max_length`, or leave them out with `truncate_prompts: false` and "
            "`invalid_prompts: filter`."
        ]
    assert [prompt.cut for prompt in prompts_from_batch(collate_prompts(prepared))] == [False, True, False]


def test_the_limit_that_cuts_is_named():
    message = cut_message("eval", 2, 3, arguments(max_prompt_length=4, max_length=100, max_new_tokens=8))
    assert message.startswith(
        "eval: 2 of 3 prompts are longer than 4 tokens, which is `max_prompt_length`; they are cut on the left."
    )


# tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adds", "text", "tokens"),
    [
        ("$A", "a b", ["a", "b"]),
        ("$A", "<s> a b", ["<s>", "a", "b"]),
        ("$A", "a b </s>", ["a", "b", "</s>"]),
        ("<s> $A", "a b", ["<s>", "a", "b"]),
        ("<s> $A", "<s> a b", ["<s>", "a", "b"]),
        ("<s> $A", "<s>", ["<s>"]),
        ("<s> $A", "a <s> b", ["<s>", "a", "<s>", "b"]),
        ("<s> $A </s>", "a b", ["<s>", "a", "b"]),
        ("<s> $A </s>", "<s> a b </s>", ["<s>", "a", "b", "</s>"]),
        ("$A </s>", "a b", ["a", "b"]),
        ("$A </s>", "a b </s>", ["a", "b", "</s>"]),
        ("$A </s> </s>", "a", ["a"]),
    ],
)
def test_text_keeps_the_tokenizers_bos_once_and_not_its_eos(adds, text, tokens):
    assert tokenize_text(word_tokenizer(adds), text)[0] == ids(*tokens)


def test_tokenizer_without_a_template_of_its_own():
    assert tokenize_text(ByT5Tokenizer(), "ab") == ([ord("a") + 3, ord("b") + 3], 0)


def test_truncate_left():
    numbers = [1, 20, 21, 22, 23]
    assert truncate_left(numbers, 5, kept_first=1) == numbers
    assert truncate_left(numbers, 3, kept_first=0) == [21, 22, 23]
    assert truncate_left(numbers, 3, kept_first=1) == [1, 22, 23]
    assert truncate_left(numbers, 1, kept_first=1) == [23]


@pytest.mark.parametrize(
    ("adds", "text", "limit", "tokens"),
    [
        ("$A", "a b c d e", 3, ["c", "d", "e"]),
        ("$A", "a b c d e", 5, ["a", "b", "c", "d", "e"]),
        ("$A", "<s> a b c d e", 3, ["<s>", "d", "e"]),
        ("<s> $A", "a b c d e", 3, ["<s>", "d", "e"]),
        ("<s> $A", "<s> a b c d e", 3, ["<s>", "d", "e"]),
        ("<s> $A </s>", "a b c d e", 6, ["<s>", "a", "b", "c", "d", "e"]),
        ("<s> $A </s>", "a b c d e", 2, ["<s>", "e"]),
        ("<s> $A", "a b", 1, ["b"]),
    ],
)
def test_long_prompts_lose_their_left(adds, text, limit, tokens, shape):
    [row], _ = prepare(shape([{"prompt": text}]), word_tokenizer(adds), max_length=None, max_prompt_length=limit)
    assert row["prompt_ids"] == ids(*tokens)
    cut = len(tokens) < len(tokenize_text(word_tokenizer(adds), text)[0])
    assert row["prompt"] == (" ".join(tokens).removeprefix("<s> ") if cut else text)


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (14, [system("e"), user("a"), assistant("b"), user("c d a")]),
        (13, [system("e"), user("c d a")]),
        (8, [system("e"), user("c d a")]),
        (7, [system("e"), user("d a")]),
        (6, [system("e"), user("a")]),
    ],
)
def test_long_conversations_lose_whole_turns_and_then_the_beginning_of_a_message(limit, kept, shape):
    rows = [{"prompt": [system("e"), user("a"), assistant("b"), user("c d a")]}]
    [row], _ = prepare(shape(rows), word_tokenizer("$A", CHAT), max_length=None, max_prompt_length=limit)
    assert row["prompt"] == kept
    [whole], _ = prepare(shape([{"prompt": kept}]), word_tokenizer("$A", CHAT), max_length=None)
    assert row["prompt_ids"] == whole["prompt_ids"] and len(whole["prompt_ids"]) <= limit


def test_a_conversation_that_cannot_be_cut_to_fit_is_unusable(shape):
    rows = [{"prompt": [system("e e e e e"), user("a")]}, {"prompt": [user("a")]}]
    kept, left_out = prepare(
        shape(rows), word_tokenizer("$A", CHAT), max_length=None, max_prompt_length=4, invalid_prompts="filter"
    )
    reasons = list(left_out) or [row["prompt_invalid"] for row in kept if row["prompt_invalid"]]
    assert [reason[:37] for reason in reasons] == ["the prompt leaves no room for a compl"]


def test_prompt_limit_comes_from_max_length_too():
    [row], _ = prepare([{"prompt": "a b c d e"}], word_tokenizer(), max_length=6, max_new_tokens=4)
    assert row["prompt_ids"] == ids("d", "e")
    [row], _ = prepare([{"prompt": "a b c d e"}], word_tokenizer(), max_length=None)
    assert row["prompt_ids"] == ids("a", "b", "c", "d", "e")


@pytest.mark.smoke
@pytest.mark.parametrize("adds", ["$A", "<s> $A </s>"])
def test_messages_are_rendered_by_the_chat_template_which_writes_the_special_tokens(adds, shape):
    rows = [{"prompt": [user("a"), assistant("b"), user("c d")]}, {"prompt": [user("a")]}]
    first, second = prepare(shape(rows), word_tokenizer(adds, CHAT))[0]
    assert first["prompt_ids"] == ids("<user>", "a", "</s>", "<bot>", "b", "</s>", "<user>", "c", "d", "<bot>")
    assert second["prompt_ids"] == ids("<user>", "a", "<bot>")
    assert first["prompt"] == rows[0]["prompt"]


def test_a_last_assistant_message_is_continued(shape):
    [row], _ = prepare(shape([{"prompt": [user("a"), assistant("b")]}]), word_tokenizer("<s> $A", CHAT))
    assert row["prompt_ids"] == ids("<user>", "a", "</s>", "<bot>", "b")


def test_bos_of_a_chat_template_survives_truncation():
    tokenizer = word_tokenizer("<s> $A", "<s>" + CHAT)
    [row], _ = prepare([{"prompt": [user("a b c d")]}], tokenizer, max_length=None, max_prompt_length=4)
    assert row["prompt_ids"] == ids("<s>", "<user>", "d", "<bot>") and row["prompt"] == [user("d")]


def test_chat_template_arguments_of_configuration_and_row(shape):
    rows = [
        {"prompt": [user("a")], "chat_template_kwargs": {"thinking": True, "other": None}},
        {"prompt": [user("a")], "chat_template_kwargs": {"thinking": None, "other": 1}},
        {"prompt": [user("a")], "chat_template_kwargs": None},
    ]
    tokenizer = word_tokenizer(chat_template=CHAT)
    plain, thinking = ids("<user>", "a", "<bot>"), ids("<user>", "a", "<bot>", "e")
    assert [row["prompt_ids"] for row in prepare(shape(rows), tokenizer)[0]] == [thinking, plain, plain]
    on = prepare(shape(rows), tokenizer, chat_template_kwargs={"thinking": True})[0]
    assert [row["prompt_ids"] for row in on] == [thinking, thinking, thinking]


def test_chat_template_may_come_with_the_arguments():
    [row], _ = prepare([{"prompt": [user("a")]}], word_tokenizer(), chat_template_kwargs={"chat_template": CHAT})
    assert row["prompt_ids"] == ids("<user>", "a", "<bot>")


def test_chat_template_arguments_that_are_set_here_are_refused():
    with pytest.raises(ValueError, match="`chat_template_kwargs` must not hold add_generation_prompt"):
        prepare(
            [{"prompt": [user("a")]}],
            word_tokenizer(chat_template=CHAT),
            chat_template_kwargs={"add_generation_prompt": False},
        )


@pytest.mark.parametrize("tools", [[{"name": "c", "x": None}], '[{"name": "c"}]'])
def test_tools_reach_the_chat_template(tools):
    [row], _ = prepare([{"prompt": [user("a")], "tools": tools}], word_tokenizer(chat_template=CHAT))
    assert row["prompt_ids"] == ids("<user>", "a", "<bot>", "c")


def test_keys_that_arrow_filled_with_none_do_not_reach_the_template():
    template = "{% for m in messages %}{{ m.content }} {{ 'e' if 'name' in m }} {% endfor %}"
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "a", "name": "x"}]}, {"prompt": [user("b")]}])
    assert rows[1]["prompt"][0]["name"] is None
    first, second = prepare(rows, word_tokenizer(chat_template=template))[0]
    assert first["prompt_ids"] == ids("a", "e")
    assert second["prompt_ids"] == ids("b")


RESERVED = ("chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "conversation", "messages")


@pytest.mark.parametrize("argument", [*RESERVED, "max_length", "return_dict", "tokenizer_kwargs", "bos_token"])
def test_a_row_cannot_replace_its_template_or_how_it_is_applied(argument):
    rows = [{"prompt": [user("a")], "chat_template_kwargs": {argument: "{{ 1 }}", "thinking": True}}]
    with pytest.raises(InvalidPromptError, match=f"Row 0 .*hold {argument}, but a row sets variables of"):
        prepare(rows, word_tokenizer(chat_template=CHAT))
    if argument != "chat_template":  # which the configuration may say
        with pytest.raises(ValueError, match=f"`chat_template_kwargs` must not hold {argument}"):
            prepare([{"prompt": [user("a")]}], word_tokenizer(chat_template=CHAT), chat_template_kwargs={argument: "x"})


def test_a_row_may_bring_documents_for_its_template():
    rows = [{"prompt": [user("a")], "chat_template_kwargs": {"documents": [{"text": "a b"}]}}]
    tokenizer = word_tokenizer(chat_template=CHAT)
    tokenizer.chat_template = "{% for d in documents %}{{ d.text }} {% endfor %}" + CHAT
    [row], _ = prepare(rows, tokenizer)
    [without], _ = prepare([{"prompt": [user("a")]}], word_tokenizer(chat_template=CHAT))
    assert len(row["prompt_ids"]) == len(without["prompt_ids"]) + 2
