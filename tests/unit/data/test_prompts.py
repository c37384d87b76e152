"""Preparing prompts: where they stand in a row, datasets of every kind, and real text."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher

from online_dpo.data.convert import PromptSource
from online_dpo.data.load import load_prompts
from online_dpo.data.prompts import PromptRow, prepare_prompts
from online_dpo.errors import InvalidPromptError
from support.prompt_rows import CHAT, arguments, assistant, byte_tokenizer, ids, prepare, user, word_tokenizer

# where the prompt is --------------------------------------------------------------------------------------------------


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


# datasets' own ways ---------------------------------------------------------------------------------------------------


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


# real text ------------------------------------------------------------------------------------------------------------


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
