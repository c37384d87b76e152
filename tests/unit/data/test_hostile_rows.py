"""Rows that would be trained on as something else: roles, parts, blank texts, templates, columns."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from datasets import Dataset

from online_dpo.data.prompts import prepare_prompts
from online_dpo.data.template import fill_template, template_columns
from online_dpo.data.text import MAX_CHARACTERS, UnusablePrompt, checked_text, is_blank
from online_dpo.errors import InvalidPromptError
from online_dpo.training.datasets import DatasetPreparer
from support.prompt_rows import arguments, assistant, byte_tokenizer, prepare, system, user

CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PARTS = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    "{% endif %}",
)
SILENT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[user]{{ m['content'] | trim }}\n"
    "{% elif m['role'] == \"ipython\" %}[tool]{{ m['content'] | tojson }}\n"
    "{% elif m['role'] == 'assistant' %}[assistant]{{ m['content'].split('</think>')[-1] }}\n{% endif %}{% endfor %}"
)


def tokenizer(template: str) -> Any:
    made = byte_tokenizer(adds_bos=False)
    made.chat_template = template
    return made


def rendered(messages: Any, template: str) -> str:
    made = tokenizer(template)
    [row], _ = prepare([{"prompt": messages}], made)
    return made.decode(row["prompt_ids"])


def part(text: Any, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": text}


def message(role: Any, content: Any = "hi") -> dict[str, Any]:
    return {"role": role, "content": content}


REFUSED_MESSAGES = {
    "User": ([message("User")], CHATML, "a message has the role 'User' (do you mean 'user'?)"),
    "SYSTEM": ([message("SYSTEM"), user("a")], CHATML, "a message has the role 'SYSTEM' (do you mean 'system'?)"),
    "white space": ([message("user ")], CHATML, "a message has the role 'user ' (do you mean 'user'?)"),
    "human": ([message("human")], SILENT, "a message has the role 'human' (do you mean 'user'?)"),
    "model": ([user("a"), message("model"), user("b")], CHATML, "a message has the role 'model' (do you mean 'assist"),
    "empty": (
        [message("")],
        CHATML,
        "a message has the role '', which the chat template does not name; wanted: one of",
    ),
    "a number": ([message(1)], CHATML, "a message has no `role`"),
    "a system message that is dropped": (
        [system("be kind"), user("a")],
        SILENT,
        "the chat template leaves out a messag",
    ),
    "an answer of a tool that is dropped": (
        [user("a"), message("tool")],
        SILENT,
        "the chat template leaves out a messa",
    ),
    "two parts in a template for text": (
        [user([part("a"), part("b")])],
        CHATML,
        "the `content` of a message is a list",
    ),
    "an image": (
        [user([part("a"), {"type": "image"}])],
        PARTS,
        "a part of a message is of the type 'image'; only text",
    ),
    "a part without text": ([user([part(None)])], PARTS, "a part of a message has no `text`"),
    "a number as text": ([user([part(5)])], PARTS, "a part of a message has no `text`"),
    "parts that are texts": ([user(["a"])], PARTS, "a part of a message is no dict with a `type`"),
    "zero width": ([user("\u200b\u200d")], CHATML, "the last message is empty"),
    "zero width in a part": ([user([part("\ufeff")])], PARTS, "the last message is empty"),
    "half of a character": ([user("a\ud800")], CHATML, "the text holds half of a character (U+D800, a lone surrogate)"),
    "JSON": (
        '[{"role": "user", "content": "hi"}]',
        CHATML,
        "the text is a list of messages that has been written as te",
    ),
    "Python": (
        " [{'content': 'hi', 'role': 'user'}]",
        CHATML,
        "the text is a list of messages that has been written as",
    ),
    "one message as JSON": ('{"role": "user", "content": "hi"}', CHATML, "the text is a list of messages"),
}


@pytest.mark.parametrize("case", REFUSED_MESSAGES)
def test_messages_that_no_template_would_show_as_they_are(case: str) -> None:
    messages, template, reason = REFUSED_MESSAGES[case]
    with pytest.raises(InvalidPromptError) as caught:
        prepare([{"prompt": messages}], tokenizer(template))
    assert str(caught.value).startswith(
        f"Row 0 of train_dataset cannot be used as a prompt (column `prompt`): {reason}"
    )
    rows = [{"prompt": [user("ok")]}, {"prompt": messages}]
    kept, dropped = prepare(rows, tokenizer(template), invalid_prompts="filter")
    assert ([row["prompt"] for row in kept], sum(dropped.values())) == ([[user("ok")]], 1)


RENDERED = {
    "one part in a template for text": ([user([part("hi")])], CHATML, "[user]hi\n[assistant]"),
    "parts in a template for parts": ([user([part("a "), part("b")])], PARTS, "[user]a b[assistant]"),
    "a role that the template names": ([user("a"), message("ipython", 'x"y')], SILENT, '[user]a\n[tool]"x\\"y"\n'),
    "a tool": ([user("a"), message("tool", "42")], CHATML, "[user]a\n[tool]42\n[assistant]"),
    "trimmed": ([user("  a b \n")], SILENT, "[user]a b\n"),
    "a thought that is left out": (
        [user("a"), assistant("hm</think>b"), user("c")],
        SILENT,
        "[user]a\n[assistant]b\n[user]c\n",
    ),
    "no word": ([user("?!")], CHATML, "[user]?!\n[assistant]"),
    "a bracket": ("[1, 2] what is the sum?", CHATML, "[1, 2] what is the sum?"),
    "JSON that is no message": ('{"value": 3}', CHATML, '{"value": 3}'),
}


@pytest.mark.parametrize("case", RENDERED)
def test_messages_that_are_shown_as_they_are(case: str) -> None:
    messages, template, text = RENDERED[case]
    assert rendered(messages, template) == text


def test_a_table_of_parts_becomes_text_for_scorers_as_well() -> None:
    rows = Dataset.from_list([{"prompt": [user([part("hi")])]}, {"prompt": [user([part("w"), part("x")])]}])
    prepared, dropped = prepare(rows, tokenizer(CHATML), invalid_prompts="filter")
    assert [row["prompt"] for row in prepared] == [[user("hi")]]
    assert [row["prompt_cut"] for row in prepared] == [False] and sum(dropped.values()) == 1
    prepared, _ = prepare(rows, tokenizer(PARTS))
    assert prepared[1]["prompt"] == [user([part("w"), part("x")])]


def test_a_row_cannot_replace_the_template() -> None:
    for key in ("chat_template", "conversation", "messages", "tokenize", "return_dict", "max_length"):
        row = {"prompt": [user("hi")], "chat_template_kwargs": {key: "x"}}
        with pytest.raises(InvalidPromptError, match=f"its `chat_template_kwargs` hold {key}"):
            prepare([row], tokenizer(CHATML))
    with pytest.raises(ValueError, match="`chat_template_kwargs` must not hold padding"):
        prepare([{"prompt": [user("hi")]}], tokenizer(CHATML), chat_template_kwargs={"padding": True})


BLANK = [*"\u200b\ufeff\x01\x7f\u0301\0\u200f\U000e0041\ufe0f\u00ad\u3164\u2800\u1160", "\u200b \u0301\n"]


@pytest.mark.parametrize("text", BLANK, ids=ascii)
def test_texts_without_a_visible_character(text: str) -> None:
    with pytest.raises(UnusablePrompt, match="^the text has no visible character$"):
        checked_text(text * 3)
    assert not is_blank(f"{text}a") and checked_text(f"{text}a") == f"{text}a"


def test_texts_that_stay_as_they_are() -> None:
    for text in ("שלום", "👨\u200d👩", "e\u0301", "a\0b", "<s>a</s>", "{{x}}", "?", "x" * MAX_CHARACTERS):
        assert checked_text(text) == text


def test_a_text_that_no_context_has_room_for() -> None:
    with pytest.raises(UnusablePrompt, match="^the text has 1000001 characters; wanted: at most 1000000$"):
        checked_text("x" * (MAX_CHARACTERS + 1))


REFUSED_TEMPLATES = {
    "{x.__class__}": "'{x.__class__}' reads an attribute. Name a column, such as '{x}'",
    "{x.upper}": "'{x.upper}' reads an attribute",
    "{x[0].real}": "'{x[0].real}' reads an attribute",
    "{x:>1000000000}": "the format ':>1000000000' may hold no other field, and no width above 999",
    "{x:.99999f}": "no width above 999",
    "{x:{y}}": "the format ':{y}' may hold no other field",
    "{x!z}": "there is no conversion '!z'",
    "{0}": "must name columns in braces",
    "{}": "must name columns in braces",
    "plain": "must name columns in braces",
    "{{x}}": "must name columns in braces",
    "": "must name columns in braces",
    "{x": "is malformed",
    "x}": "is malformed",
}


@pytest.mark.parametrize("template", REFUSED_TEMPLATES)
def test_templates_that_are_refused(template: str) -> None:
    with pytest.raises(ValueError) as caught:
        template_columns(template)
    assert str(caught.value).startswith(f"`prompt_template` {template!r}")
    assert REFUSED_TEMPLATES[template] in str(caught.value)


ROW = {
    "x": "hi",
    "n": 3,
    "f": 2.5,
    "nan": float("nan"),
    "none": None,
    "d": {"a": 1, "b": None},
    "l": ["p"],
    "bytes": b"x",
}


@pytest.mark.parametrize(
    ("template", "reason"),
    {
        "{none}": "column `none` of the template is missing (null)",
        "{nan}": "`nan` of the template is missing (NaN)",
        "{d[b]}": "`d[b]` of the template is missing (null)",
        "{bytes}": "`bytes` of the template is of type bytes, not text",
        "{d[c]}": "the template cannot be filled (KeyError: 'c')",
        "{x:d}": "the template cannot be filled (ValueError: Unknown format code 'd'",
    }.items(),
)
def test_values_that_would_be_printed_as_python_prints_them(template: str, reason: str) -> None:
    with pytest.raises(UnusablePrompt) as caught:
        fill_template(template, ROW)
    assert str(caught.value).startswith(reason)


def test_values_of_a_template() -> None:
    assert fill_template("{x} {n:>3} {f:.2f} {d[a]} {l[0]} {x!r} {{}}", ROW) == "hi   3 2.50 1 p 'hi' {}"


def test_keys_and_depth_of_rows() -> None:
    with pytest.raises(TypeError, match="rows must have names as keys; one has 5"):
        prepare([{"prompt": "a", 5: 1}], byte_tokenizer(False))
    endless: list[Any] = []
    endless.append(endless)
    for value in (endless, {"a": endless}):
        with pytest.raises(ValueError, match="a value of column `x` is nested more than 100 levels deep"):
            prepare([{"prompt": "a", "x": value}], byte_tokenizer(False))
    assert prepare([{"prompt": "a", "x": [[[]]]}], byte_tokenizer(False))[0][0]["x"] == [[[]]]


def test_no_processes_are_this_process() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    alone, none = (prepare(rows, byte_tokenizer(False), dataset_num_proc=count)[0] for count in (None, 0))
    assert alone == none


def test_columns_that_reward_functions_never_see_are_told(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a", "completions": "mine", "trainer_state": 1, "answer": "2"}]
    with caplog.at_level(logging.WARNING):
        DatasetPreparer(byte_tokenizer(False), arguments()).prepare(rows, "train_dataset")
    [record] = [record for record in caplog.records if "do not reach" in record.getMessage()]
    assert "train_dataset: the columns completions, trainer_state do not reach reward functions" in record.getMessage()
    prepare_prompts(rows, byte_tokenizer(False), arguments())  # they are no error
