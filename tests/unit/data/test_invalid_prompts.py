"""Rows that cannot be a prompt: an error that names the row, or left out and counted."""

from __future__ import annotations

import logging
import re
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from online_dpo.data.collate import collate_prompts, prompts_from_batch
from online_dpo.data.prompts import prepare_prompts
from online_dpo.errors import InvalidPromptError
from support.prompt_rows import CHAT, arguments, ids, prepare, user, word_tokenizer, yield_rows

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
            rows
            if request.param == "list"
            else IterableDataset.from_generator(yield_rows, gen_kwargs={"rows": tuple(rows)})
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
    stream = IterableDataset.from_generator(yield_rows, gen_kwargs={"rows": tuple(rows)})
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
        prepare([{"prompt": [user("a")]}, {"prompt": [user("!")]}], tokenizer)


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
