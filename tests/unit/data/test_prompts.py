"""Preparing prompts: tokens, truncation, validation, map-style and streaming alike."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.fingerprint import Hasher
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.collate import collate_prompts, prompts_from_batch
from online_dpo.data.convert import PromptSource
from online_dpo.data.cut import cut_message
from online_dpo.data.load import load_prompts
from online_dpo.data.prompts import PromptRow, prepare_prompts
from online_dpo.data.tokens import tokenize_text, truncate_left
from online_dpo.errors import InvalidPromptError

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


@pytest.fixture(params=["map", "streaming", "streaming without features"])
def shape(request):
    """The same rows as a map-style dataset or a stream."""

    def as_shape(rows):
        if request.param == "map":
            return Dataset.from_list(rows)
        if request.param == "streaming":
            return Dataset.from_list(rows).to_iterable_dataset()
        return IterableDataset.from_generator(_rows, gen_kwargs={"rows": tuple(rows)})

    return as_shape


def _rows(rows):
    yield from rows


def prepare(rows, tokenizer, **kwargs):
    prepared, left_out = prepare_prompts(rows, tokenizer, arguments(**kwargs))
    return list(prepared), left_out


# --- prompts that are too long ------------------------------------------------------------------------------------


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


# --- tokens -------------------------------------------------------------------------------------------------------


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


# --- where the prompt is ----------------------------------------------------------------------------------------------


def test_all_columns_stay_and_rows_keep_their_number(shape):
    rows = [{"question": "a", "label": 1, "meta": {"x": [1]}}, {"question": "b", "label": 2, "meta": {"x": []}}]
    prepared, left_out = prepare(shape(rows), word_tokenizer(), prompt_column="question")
    assert prepared == [
        {
            **rows[0],
            "prompt": "a",
            "prompt_ids": ids("a"),
            "prompt_row": 0,
            "prompt_invalid": None,
            "prompt_cut": False,
        },
        {
            **rows[1],
            "prompt": "b",
            "prompt_ids": ids("b"),
            "prompt_row": 1,
            "prompt_invalid": None,
            "prompt_cut": False,
        },
    ]
    assert left_out == Counter()


def test_template(shape):
    [row], _ = prepare(
        shape([{"question": "a b", "topic": "c"}]), word_tokenizer(), prompt_template="{topic} : {question}"
    )
    assert row["prompt"] == "c : a b"
    assert row["prompt_ids"] == ids("c", ":", "a", "b")


def test_template_over_a_column_of_another_column_called_prompt(shape):
    [row], _ = prepare(shape([{"prompt": "a"}]), word_tokenizer(), prompt_template="{prompt} :")
    assert row["prompt"] == "a :"


def test_messages_lose_the_answer_in_both_columns(shape):
    rows = [{"messages": [user("a"), assistant("b")]}]
    [row], _ = prepare(shape(rows), word_tokenizer(chat_template=CHAT))
    assert row["prompt"] == [user("a")]
    assert row["messages"] == rows[0]["messages"]
    assert row["prompt_ids"] == ids("<user>", "a", "<bot>")


def test_chosen_messages(shape):
    rows = [{"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}]
    [row], _ = prepare(shape(rows), word_tokenizer(chat_template=CHAT))
    assert row["prompt"] == [user("a")]


HH = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "\n\nHuman: a\n\nAssistant: e"}


def test_transcripts_become_messages_with_a_chat_template(shape):
    [row], _ = prepare(shape([HH]), word_tokenizer(chat_template=CHAT))
    assert row["prompt"] == [user("a"), assistant("b"), user("c")]
    assert row["prompt_ids"] == ids("<user>", "a", "</s>", "<bot>", "b", "</s>", "<user>", "c", "<bot>")
    assert (row["chosen"], row["rejected"]) == (HH["chosen"], HH["rejected"])


def test_transcripts_stay_text_without_a_chat_template(shape, caplog):
    caplog.set_level(logging.INFO, "online_dpo")
    [row], _ = prepare(shape([HH]), word_tokenizer("<s> $A"))
    assert row["prompt"] == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    human, bot = ["Human", ":"], ["Assistant", ":"]
    assert row["prompt_ids"] == ids("<s>", *human, "a", *bot, "b", *human, "c", *bot)
    assert "train_dataset: the tokenizer has no chat template, so the transcripts of column `chosen`" in caplog.text


def test_messages_without_a_chat_template_are_one_error_before_any_row(shape):
    rows = [{"prompt": [user("a")]}, {"prompt": []}]
    with pytest.raises(ValueError, match="train_dataset holds messages .*no chat template") as raised:
        prepare_prompts(shape(rows), word_tokenizer(), arguments())
    assert not isinstance(raised.value, InvalidPromptError)


def test_no_usable_column(shape):
    with pytest.raises(ValueError, match=r"columns are question, x; .*Set `prompt_column`"):
        prepare_prompts(shape([{"question": "a", "x": 1}]), word_tokenizer(), arguments())
    with pytest.raises(ValueError, match=r"`prompt_template` uses q, but the dataset's columns are: question"):
        prepare_prompts(shape([{"question": "a"}]), word_tokenizer(), arguments(prompt_template="{q}"))


@pytest.mark.parametrize("column", ["prompt_ids", "prompt_row", "prompt_invalid", "prompt_cut"])
def test_columns_that_are_added_must_be_free(column, shape):
    with pytest.raises(ValueError, match=f"train_dataset already has the columns {column}"):
        prepare_prompts(shape([{"prompt": "a", column: 1}]), word_tokenizer(), arguments())


def test_ignored_options_are_told(caplog):
    rows = [{"question": "a", "prompt": "b"}]
    [row], _ = prepare(rows, word_tokenizer(), prompt_column="question")
    assert row["prompt"] == "a"
    assert "the prompts are read from column `question` and replace the column `prompt`" in caplog.text
    caplog.clear()
    [row], _ = prepare(rows, word_tokenizer(), prompt_column="question", prompt_template="{prompt} c")
    assert row["prompt"] == "b c"
    assert "`prompt_column` is ignored" in caplog.text


# --- invalid rows -----------------------------------------------------------------------------------------------------

LONG = "the prompt is longer than 3 tokens and leaves no room for a completion"
INVALID = {
    "empty": ("", "the text is empty"),
    "white space": (" \n ", "the text is empty"),
    "null": (None, "the value is missing (null)"),
    "number": (3, "the value is of type int, not text or a list of messages"),
    "messages among text": ([user("a")], "this row holds messages, other rows hold text"),
    "too long": ("a b c d", LONG),
}
INVALID_CHAT = {
    "no message": ([], "the list of messages is empty"),
    "no dict": (["a"], "a message is of type str"),
    "no role": ([{"content": "a"}], "a message has no `role`"),
    "no content": ([{"role": "user"}], "a message has no `content`"),
    "empty content": ([user("")], "the last message is empty"),
    "null": (None, "the value is missing (null)"),
    "text among messages": ("a", "this row holds text, other rows hold messages"),
    "refused by the template": (
        [user("a"), {"role": "system", "content": "b"}],
        "the chat template refuses the messages (no system message last)",
    ),
    "too long": ([user("a b c d")], LONG),
}
CASES = [("text", case) for case in INVALID] + [("chat", case) for case in INVALID_CHAT]


@pytest.fixture(params=["list", "streaming"])
def any_values(request):
    """Rows whose values have several types, as a list of dicts or a stream."""

    def as_shape(rows):
        return (
            rows if request.param == "list" else IterableDataset.from_generator(_rows, gen_kwargs={"rows": tuple(rows)})
        )

    return as_shape


def invalid_rows(kind, case):
    value, reason = (INVALID if kind == "text" else INVALID_CHAT)[case]
    valid = "a b" if kind == "text" else [user("a")]
    tokenizer = word_tokenizer(chat_template=None if kind == "text" else CHAT)
    return [{"prompt": valid, "n": 0}, {"prompt": value, "n": 1}, {"prompt": valid, "n": 2}], reason, tokenizer


LIMITED = {"max_length": None, "max_prompt_length": 3, "truncate_prompts": False}


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_invalid_row_is_an_error_that_names_it(kind, case, any_values):
    rows, reason, tokenizer = invalid_rows(kind, case)
    message = re.escape("Row 1 of eval_dataset cannot be used as a prompt (column `prompt`): " + reason)
    with pytest.raises(InvalidPromptError, match=message + r'.*set `invalid_prompts="filter"`'):
        list(prepare_prompts(any_values(rows), tokenizer, arguments(**LIMITED), name="eval_dataset")[0])


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_filter_leaves_invalid_rows_out_and_counts_them(kind, case, caplog):
    rows, reason, tokenizer = invalid_rows(kind, case)
    prepared, left_out = prepare(rows, tokenizer, invalid_prompts="filter", **LIMITED)
    assert [(row["n"], row["prompt_row"], row["prompt_invalid"]) for row in prepared] == [(0, 0, None), (2, 2, None)]
    assert list(left_out.values()) == [1]
    assert next(iter(left_out)).startswith(reason)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith(f"train_dataset: 1 of 3 rows are left out: 1 x {reason}")


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_filter_keeps_invalid_rows_of_a_stream_with_their_reason(kind, case):
    rows, reason, tokenizer = invalid_rows(kind, case)
    stream = IterableDataset.from_generator(_rows, gen_kwargs={"rows": tuple(rows)})
    prepared, left_out = prepare(stream, tokenizer, invalid_prompts="filter", **LIMITED)
    assert left_out == Counter()
    assert [row["prompt_row"] for row in prepared] == [0, 1, 2]
    assert [row["prompt_invalid"] is None for row in prepared] == [True, False, True]
    assert prepared[1]["prompt_invalid"].startswith(reason)
    assert prepared[1]["prompt_ids"] == []
    assert prepared[1]["n"] == 1
    [invalid] = prompts_from_batch(collate_prompts([prepared[1]]))
    assert invalid.invalid == prepared[1]["prompt_invalid"]
    assert invalid.is_conversational == (kind == "chat")


def test_counts_by_reason(caplog):
    values = ["a", "", None, " ", "b", None, ""]
    prepared, left_out = prepare([{"prompt": value} for value in values], word_tokenizer(), invalid_prompts="filter")
    assert [row["prompt"] for row in prepared] == ["a", "b"]
    assert left_out == {"the text is empty": 3, "the value is missing (null)": 2}
    assert "5 of 7 rows are left out: 3 x the text is empty; 2 x the value is missing (null)." in caplog.text


def test_text_without_tokens():
    backend = Tokenizer(models.BPE({"a": 0}, []))  # other letters become no token at all
    backend.post_processor = processors.TemplateProcessing(single="a $A", special_tokens=[("a", 0)])
    with pytest.raises(InvalidPromptError, match="Row 1 of train_dataset .*the prompt has no tokens"):
        prepare([{"prompt": "a"}, {"prompt": "xyz"}], PreTrainedTokenizerFast(tokenizer_object=backend))


def test_messages_without_tokens():
    tokenizer = word_tokenizer(chat_template="{{ messages[0].content if messages[0].content == 'a' }}")
    with pytest.raises(InvalidPromptError, match="Row 1 of train_dataset .*the prompt has no tokens"):
        prepare([{"prompt": [user("a")]}, {"prompt": [user("b")]}], tokenizer)


def test_wrong_tools_and_arguments_of_a_row():
    tokenizer = word_tokenizer(chat_template=CHAT)
    with pytest.raises(InvalidPromptError, match="Row 0 of .*its `tools` are no JSON"):
        prepare([{"prompt": [user("a")], "tools": "search"}], tokenizer)
    with pytest.raises(InvalidPromptError, match="Row 0 of .*its `chat_template_kwargs` are of type str"):
        prepare([{"prompt": [user("a")], "chat_template_kwargs": "x"}], tokenizer)


def test_plain_answers_in_chosen_point_to_prompt_column(shape):
    with pytest.raises(InvalidPromptError, match="Row 0 of .*no transcript.*set `prompt_column`"):
        list(prepare_prompts(shape([{"question": "a", "chosen": "b"}]), word_tokenizer(), arguments())[0])


def test_invalid_rows_before_the_first_valid_one_do_not_decide_the_kind(any_values):
    rows = [{"prompt": []}, {"prompt": None}, {"prompt": [user("a")]}, {"prompt": "b"}]
    prepared, left_out = prepare(any_values(rows), word_tokenizer(chat_template=CHAT), invalid_prompts="filter")
    assert [row["prompt_ids"] for row in prepared if row["prompt_invalid"] is None] == [ids("<user>", "a", "<bot>")]
    assert {*left_out, *(row["prompt_invalid"] for row in prepared)} - {None} == {
        "the list of messages is empty",
        "the value is missing (null)",
        "this row holds text, other rows hold messages",
    }


def test_no_valid_row_at_all(any_values):
    rows = [{"prompt": ""}] * 3
    message = r"(No row of |None of the first 3 rows of )train_dataset is a usable prompt.*: (3 x )?the text is empty"
    with pytest.raises(ValueError, match=message):
        prepare_prompts(any_values(rows), word_tokenizer(), arguments(invalid_prompts="filter"))


def test_empty_dataset(any_values):
    with pytest.raises(ValueError, match="eval_dataset is empty"):
        prepare_prompts(any_values([]), word_tokenizer(), arguments(), name="eval_dataset")


def test_other_types_are_refused():
    rows = Dataset.from_list([{"prompt": "a"}])
    with pytest.raises(TypeError, match=r"not DatasetDict\. Choose a split: train, test\."):
        prepare_prompts(DatasetDict(train=rows, test=rows), word_tokenizer(), arguments())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="train_dataset must be a datasets.Dataset.*not tuple"):
        prepare_prompts(({"prompt": "a"},), word_tokenizer(), arguments())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="its rows must be dicts; row 1 is 'b'"):
        prepare_prompts([{"prompt": "a"}, "b"], word_tokenizer(), arguments())  # type: ignore[list-item]


def test_a_list_keeps_columns_that_only_later_rows_have():
    prepared, _ = prepare([{"prompt": "a"}, {"prompt": "b", "label": 1}], word_tokenizer())
    assert [row["label"] for row in prepared] == [None, 1]


# --- datasets' own ways -----------------------------------------------------------------------------------------------


def test_a_tensor_format_of_the_dataset_does_not_reach_the_prompts(shape):
    rows = shape([{"prompt": "a b", "label": 3}]).with_format("torch")
    [row], _ = prepare(rows, word_tokenizer())
    assert row["prompt_ids"] == ids("a", "b") and isinstance(row["prompt_ids"], list)
    assert isinstance(row["label"], int)


def row_function(tokenizer, **kwargs):
    source = PromptSource(column="prompt")
    kwargs = {"limit": 4, "truncate": True, "raise_invalid": False, "name": "train_dataset", **kwargs}
    return PromptRow(tokenizer=tokenizer, source=source, kind="text", **kwargs)


def test_row_function_is_picklable_and_its_hash_follows_its_settings():
    function = row_function(word_tokenizer("<s> $A"))
    copy = pickle.loads(pickle.dumps(function))
    assert copy({"prompt": "a b c d e"}, 7) == function({"prompt": "a b c d e"}, 7)
    assert copy({"prompt": "a b c d e"}, 7)["prompt_ids"] == ids("<s>", "c", "d", "e")
    assert Hasher.hash(function) == Hasher.hash(row_function(word_tokenizer("<s> $A")))
    others = [
        row_function(word_tokenizer("<s> $A </s>")),
        row_function(word_tokenizer("<s> $A", CHAT)),
        row_function(word_tokenizer("<s> $A"), limit=5),
        dataclasses.replace(function, version=function.version + 1),
    ]
    assert len({Hasher.hash(other) for other in [function, *others]}) == 5


def test_cached_preparation_follows_the_configuration(tmp_path):
    Dataset.from_list([{"prompt": "a b c"}, {"prompt": ""}]).save_to_disk(tmp_path / "saved")
    rows = Dataset.load_from_disk(tmp_path / "saved")
    for limit, tokens in ((2, ["b", "c"]), (1, ["c"]), (2, ["b", "c"])):
        [row], left_out = prepare(
            rows, word_tokenizer(), invalid_prompts="filter", max_length=None, max_prompt_length=limit
        )
        assert row["prompt_ids"] == ids(*tokens)
        assert left_out == {"the text is empty": 1}


def test_several_processes_give_the_same_rows():
    rows = [{"prompt": "a b" if i % 3 else ""} for i in range(12)]
    one = prepare(rows, word_tokenizer("<s> $A"), invalid_prompts="filter")
    assert prepare(rows, word_tokenizer("<s> $A"), invalid_prompts="filter", dataset_num_proc=2) == one
    assert [row["prompt_row"] for row in one[0]] == [i for i in range(12) if i % 3]


def test_the_environment_is_the_same_object_afterwards_and_holds_the_same():
    environ, held = os.environ, dict(os.environ)
    prepare([{"prompt": "a b"}] * 12, word_tokenizer("<s> $A"), dataset_num_proc=2)
    assert os.environ is environ and dict(os.environ) == held


def test_error_of_a_row_crosses_processes():
    rows = [{"prompt": "a"}] * 11 + [{"prompt": ""}]
    with pytest.raises(InvalidPromptError, match="Row 11 of train_dataset .*the text is empty"):
        prepare(rows, word_tokenizer(), dataset_num_proc=2)


def test_a_batch_of_valid_rows_only_leaves_room_for_reasons_in_the_next():
    rows = [{"prompt": "a"}] * 1000 + [{"prompt": ""}, {"prompt": "b"}]  # datasets writes 1000 rows at a time
    prepared, left_out = prepare(rows, word_tokenizer(), invalid_prompts="filter")
    assert (len(prepared), left_out) == (1001, {"the text is empty": 1})


def test_shuffled_and_repeated_streams_stay_streams():
    rows = Dataset.from_list([{"prompt": "a", "n": i} for i in range(20)]).to_iterable_dataset()
    prepared, _ = prepare_prompts(rows, word_tokenizer(), arguments())
    assert isinstance(prepared, IterableDataset)
    shuffled = list(prepared.shuffle(seed=0, buffer_size=20))
    assert sorted(row["n"] for row in shuffled) == list(range(20))
    assert [row["n"] for row in shuffled] != list(range(20))
    assert all(row["prompt_row"] == row["n"] for row in shuffled)


# --- real text --------------------------------------------------------------------------------------------------------

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the example data is not here")


@needs_data
@pytest.mark.parametrize("streaming", [False, True])
def test_real_transcripts(streaming):
    path = str(DATA / "hh-rlhf-harmless-base-test.jsonl.gz")
    rows = load_prompts(path, streaming=streaming, limit=100)
    tokenizer = byte_tokenizer(adds_bos=True)
    prepared, left_out = prepare(rows, tokenizer, max_length=None, max_prompt_length=300)
    assert (len(prepared), left_out) == (100, Counter())
    cut = 0
    for row in prepared:
        text = row["prompt"].lstrip("\ufffd")  # a cut may fall inside a character of several bytes
        assert text in row["chosen"] and text.endswith("\n\nAssistant:")
        assert "\n\nAssistant:" not in row["chosen"][row["chosen"].rindex(text) + len(text) :]
        assert row["prompt_ids"][0] == 0 and len(row["prompt_ids"]) <= 300
        tokens = tokenizer.tokenize(text)
        assert tokenizer.convert_ids_to_tokens(row["prompt_ids"])[-len(tokens) :] == tokens
        cut += len(row["prompt_ids"]) == 300
        assert row["chosen"].startswith(text) or len(row["prompt_ids"]) == 300
    assert 10 < cut < 90


@needs_data
def test_real_questions():
    rows = load_prompts(str(DATA / "gsm8k-test.jsonl"), limit=50)
    prepared, _ = prepare(
        rows, byte_tokenizer(adds_bos=False), prompt_template="Question: {question}\nAnswer:", max_length=None
    )
    assert [row["prompt"] for row in prepared] == [f"Question: {row['question']}\nAnswer:" for row in rows]
    tokenizer = byte_tokenizer(adds_bos=False)
    assert [tokenizer.decode(row["prompt_ids"]) for row in prepared] == [row["prompt"] for row in prepared]
    assert [row["answer"] for row in prepared] == list(rows["answer"])
