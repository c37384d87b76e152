"""Where a run's prompts come from: datasets, streams, and collators of one's own."""

import pytest
from datasets import IterableDataset

from online_dpo.data.collate import collate_prompts
from online_dpo.errors import InvalidPromptError, ScoringError
from support.training import LENGTHS, dataset, train_logs, trainer, word_reward


def test_streaming_equals_map_style(tmp_path):
    data = dataset()
    stream = IterableDataset.from_generator(lambda: iter(data.to_list()))
    calls = {"map": [], "stream": []}

    def keep(name):
        return lambda completions, **_: calls[name].append(completions) or word_reward(completions)

    for name, source in (("map", data), ("stream", stream)):
        trainer(
            tmp_path, train_dataset=source, reward_funcs=keep(name), max_steps=3, train_sampling_strategy="sequential"
        ).train()
    assert calls["map"] == calls["stream"] and len(calls["map"]) == 3


def test_invalid_rows_of_a_stream_are_counted(tmp_path):
    rows = [{"prompt": "w1 w2"}, {"prompt": "  "}, {"prompt": "w3"}, {"prompt": ""}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    made = trainer(tmp_path, train_dataset=stream, invalid_prompts="filter")
    made.train()
    [log] = train_logs(made)
    assert log["prompts"] == 4 and log["dropped/invalid_prompt"] == 2
    assert log["pairs/count"] + log.get("dropped/tie", 0) == 2
    with pytest.raises(InvalidPromptError, match="Row 1"):
        trainer(tmp_path, train_dataset=stream).train()


def test_a_stream_shorter_than_a_batch_is_read_again(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "w1"}]))
    made = trainer(tmp_path, train_dataset=stream, max_steps=3)
    made.train()
    assert [log["prompts"] for log in made.state.log_history if "prompts" in log] == [4, 4, 4]


def test_a_stream_without_max_steps_or_with_a_beta_for_each_epoch_is_refused(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(dataset().to_list()))
    with pytest.raises(ValueError, match="needs `max_steps`"):
        trainer(tmp_path, train_dataset=stream, max_steps=-1)
    with pytest.raises(ValueError, match="give one number"):
        trainer(tmp_path, train_dataset=stream, beta=[0.1, 0.2])


def test_an_own_collator_may_reorder_but_not_lose_columns(tmp_path):
    made = trainer(tmp_path, kwargs={"data_collator": lambda rows: collate_prompts(rows[::-1])})
    made.train()
    broken = trainer(tmp_path, kwargs={"data_collator": lambda rows: {"prompt": [r["prompt"] for r in rows]}})
    with pytest.raises(ValueError, match="prompt_ids"):
        broken.train()


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_column_that_a_reward_needs_is_missed_before_anything_is_loaded(tmp_path, name):
    def reward(completions, solution):
        return [0.0] * len(completions)

    with_column = dataset(solution=["a"] * len(LENGTHS))
    datasets = {"train_dataset": with_column, "eval_dataset": with_column, name: dataset()}
    with pytest.raises(ScoringError, match=f"`reward` needs the argument `solution`, but `{name}` has no such column"):
        trainer(
            tmp_path,
            model="org/that-is-nowhere",
            reward_funcs=reward,
            train_dataset=datasets["train_dataset"],
            kwargs={"eval_dataset": datasets["eval_dataset"]},
            eval_strategy="steps",
            eval_steps=1,
        )
