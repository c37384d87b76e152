"""Conversions: transcripts and conversations to prompts, templates, and what makes a row unusable."""

from __future__ import annotations

import pytest

from online_dpo.data.convert import (
    PromptSource,
    UnusablePrompt,
    find_source,
    template_columns,
    transcript_to_messages,
    transcript_to_text,
    without_nulls,
)
from support.prompt_rows import assistant, user

TRANSCRIPTS = {
    "one turn": (
        "\n\nHuman: Hi\n\nAssistant: Hello!",
        [user("Hi")],
        "\n\nHuman: Hi\n\nAssistant:",
    ),
    "two turns": (
        "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Name a pen.\n\nAssistant: Bic.",
        [user("Hi"), assistant("Hello!"), user("Name a pen.")],
        "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Name a pen.\n\nAssistant:",
    ),
    "speaker names inside a line or after one newline are text": (
        "\n\nHuman: Who says Human: and\nAssistant: no?\n\nAssistant: I\n\nHuman: ok\n\nAssistant: bye",
        [user("Who says Human: and\nAssistant: no?"), assistant("I"), user("ok")],
        "\n\nHuman: Who says Human: and\nAssistant: no?\n\nAssistant: I\n\nHuman: ok\n\nAssistant:",
    ),
    "an answer of several paragraphs": (
        "\n\nHuman: a\n\nAssistant: one\n\ntwo\n\nHuman: b\n\nAssistant: three\n\nfour",
        [user("a"), assistant("one\n\ntwo"), user("b")],
        "\n\nHuman: a\n\nAssistant: one\n\ntwo\n\nHuman: b\n\nAssistant:",
    ),
    "neighbouring turns of one speaker": (
        "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d\n\nHuman: e\n\nAssistant: f\n\nAssistant:",
        [user("a\n\nb"), assistant("c\n\nd"), user("e")],
        "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d\n\nHuman: e\n\nAssistant:",
    ),
    "ends with the human": (
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n",
        [user("a"), assistant("b"), user("c")],
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
    ),
    "no newlines in front, no space after the name": (
        "Human:a\n\nAssistant:b",
        [user("a")],
        "\n\nHuman:a\n\nAssistant:",
    ),
    "nothing but an answer": ("\n\nAssistant: b", [], ""),
}


@pytest.mark.parametrize("case", TRANSCRIPTS)
def test_transcript(case):
    transcript, messages, text = TRANSCRIPTS[case]
    assert transcript_to_messages(transcript) == messages
    assert transcript_to_text(transcript) == text


@pytest.mark.parametrize("text", ["", "Hello", "Hello\n\nHuman: Hi\n\nAssistant: Ho", "Humans: Hi"])
def test_text_that_begins_with_no_turn_is_no_transcript(text):
    with pytest.raises(ValueError, match="does not begin with"):
        transcript_to_messages(text)
    with pytest.raises(ValueError, match="does not begin with"):
        transcript_to_text(text)


def test_source_is_template_then_named_column_then_prompt_messages_chosen():
    columns = ["chosen", "messages", "prompt", "question"]
    assert find_source(columns, "question", "Q: {question}") == PromptSource(template="Q: {question}")
    assert find_source(columns, "question", None) == PromptSource(column="question")
    assert find_source(columns, None, None) == PromptSource(column="prompt")
    assert find_source(["chosen", "messages"], None, None) == PromptSource(column="messages")
    assert find_source(["rejected", "chosen"], None, None) == PromptSource(column="chosen")


@pytest.mark.parametrize(
    ("column", "template", "message"),
    [
        (None, None, r"columns are question, answer; .*Set `prompt_column`"),
        ("prompt", None, r"`prompt_column` is 'prompt', but the dataset's columns are: question, answer"),
        (None, "{question} {topic} {x}", r"uses topic, x, but the dataset's columns are: question, answer"),
        (None, "{question", r"malformed"),
        (None, "Question:", r"must name columns in braces"),
        (None, "Question: {}", r"must name columns in braces"),
        (None, "Question: {0}", r"must name columns in braces"),
    ],
)
def test_source_that_does_not_exist(column, template, message):
    with pytest.raises(ValueError, match=message):
        find_source(["question", "answer"], column, template)


def test_template_columns():
    assert template_columns("{a}: {b[topic]} {c[0]:>3} {{d}} {a!r}") == ["a", "b", "c"]


def test_template_is_filled_from_columns():
    source = PromptSource(template="{topic[name]}: {question}\n{{A}}:")
    assert source.read({"topic": {"name": "Maths"}, "question": "1 + 1?"}) == "Maths: 1 + 1?\n{A}:"


CONVERSATION = [user("a"), assistant("b"), user("c"), assistant("d"), assistant("e")]


@pytest.mark.parametrize(
    ("column", "value", "prompt"),
    [
        ("prompt", "  as it is\n", "  as it is\n"),
        ("prompt", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b"),
        ("question", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b"),
        ("prompt", CONVERSATION, CONVERSATION),
        ("question", [assistant("Sure,")], [assistant("Sure,")]),
        ("messages", CONVERSATION, [user("a"), assistant("b"), user("c")]),
        ("messages", [user("a")], [user("a")]),
        ("messages", "text", "text"),
        ("chosen", CONVERSATION, [user("a"), assistant("b"), user("c")]),
        ("chosen", "\n\nHuman: a\n\nAssistant: b", [user("a")]),
        ("rejected", "\n\nHuman: a\n\nAssistant: b", [user("a")]),
        ("prompt", [{"role": "user", "content": "a", "name": None}], [user("a")]),
        (
            "prompt",
            [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"id": None, "name": "f"}]}, user("b")],
            [user("a"), {"role": "assistant", "tool_calls": [{"name": "f"}]}, user("b")],
        ),
        ("prompt", [user([{"type": "text", "text": "a"}])], [user([{"type": "text", "text": "a"}])]),
        ("prompt", [user(""), assistant(""), user("a")], [user(""), assistant(""), user("a")]),
    ],
)
def test_column_conversion(column, value, prompt):
    row = {column: value}
    assert PromptSource(column=column).read(row) == prompt
    assert row == {column: value}


def test_transcript_as_text():
    source = PromptSource(column="chosen", transcript_as_text=True)
    assert source.read({"chosen": "\n\nHuman: a\n\nAssistant: b"}) == "\n\nHuman: a\n\nAssistant:"


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("prompt", "", "the text is empty"),
        ("prompt", " \n\t", "the text is empty"),
        ("prompt", None, r"the value is missing \(null\)"),
        ("prompt", 3, "the value is of type int, not text or a list of messages"),
        ("prompt", user("a"), "the value is of type dict"),
        ("prompt", [], "the list of messages is empty"),
        ("prompt", ["a"], "a message is of type str, not a dict"),
        ("prompt", [user("a"), None], "a message is of type NoneType, not a dict"),
        ("prompt", [{"content": "a"}], "a message has no `role`"),
        ("prompt", [{"role": None, "content": "a"}], "a message has no `role`"),
        ("prompt", [{"role": "user"}], "a message has no `content`"),
        ("prompt", [{"role": "user", "content": None}, user("a")], "a message has no `content`"),
        ("prompt", [{"role": "user", "content": 3}], "`content` of a message is of type int"),
        ("prompt", [user("a"), user(" ")], "the last message is empty"),
        ("prompt", [user([])], "the last message is empty"),
        ("prompt", [user([{"type": "text", "text": " "}])], "the last message is empty"),
        ("prompt", [user(["a"])], "a part of a message is no dict"),
        ("messages", [assistant("a")], "no message is left before the assistant's answer"),
        ("chosen", [assistant("a")], "no message is left before the assistant's answer"),
        ("chosen", "\n\nAssistant: a", "no message is left before the assistant's answer"),
        ("chosen", "\n\nHuman: \n\nAssistant: a", "the last message is empty"),
        ("chosen", "an answer", "the text is no transcript.* set `prompt_column`"),
        ("chosen", " ", "the text is empty"),
    ],
)
def test_unusable(column, value, reason):
    with pytest.raises(UnusablePrompt, match=reason):
        PromptSource(column=column).read({column: value})


@pytest.mark.parametrize("transcript", ["\n\nAssistant: a", "\n\nHuman: \n\nAssistant: a", "an answer"])
def test_unusable_transcripts_are_unusable_as_text_too(transcript):
    with pytest.raises(UnusablePrompt):
        PromptSource(column="chosen", transcript_as_text=True).read({"chosen": transcript})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"a": None}, r"column `a` of the template is missing \(null\)"),
        ({}, r"column `a` of the template is missing \(null\)"),
        ({"a": {"other": 1}}, r"cannot be filled \(KeyError: 'topic'\)"),
        ({"a": {"topic": "  "}}, "the text is empty"),
    ],
)
def test_unusable_template_rows(row, reason):
    with pytest.raises(UnusablePrompt, match=reason):
        PromptSource(template="{a[topic]}").read(row)


def test_row_without_the_column_is_unusable():
    with pytest.raises(UnusablePrompt, match=r"missing \(null\)"):
        PromptSource(column="prompt").read({"question": "a"})


def test_without_nulls_is_deep_and_keeps_other_falsy_values():
    value = [{"a": None, "b": [{"c": None, "d": 0}], "e": "", "f": {"g": None}}]
    assert without_nulls(value) == [{"b": [{"d": 0}], "e": "", "f": {}}]
    assert value[0]["a"] is None
