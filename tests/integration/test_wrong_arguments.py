"""Wrong arguments and configurations: each is refused with what to do, before a model is loaded if possible."""

import pytest
from datasets import Dataset

from online_dpo import OnlineDPOTrainer
from online_dpo.errors import InvalidPromptError, RolloutServerError, ScoringError
from support import tiny
from support.training import config, dataset, trainer, word_reward


def arguments(tmp_path, **changes):
    model = tiny.causal_lm()
    base = dict(
        model=model,
        reward_funcs=word_reward,
        args=config(tmp_path),
        train_dataset=dataset(),
        processing_class=tiny.tokenizer(),
    )
    return base | {k: (model if v == "the policy" else v) for k, v in changes.items()}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(args=None), ValueError, "`args` must be given"),
        (dict(train_dataset=None), ValueError, "`train_dataset` must be given"),
        (dict(processing_class=None), ValueError, "`processing_class` must be given"),
        (dict(model=None), ValueError, "`model` must be given"),
        (dict(ref_model="the policy"), ValueError, "same object"),
        (dict(reward_funcs=None), ValueError, "Nothing scores the completions"),
        (dict(reward_model=word_reward), ValueError, "not both"),
        (dict(reward_funcs=None, judge=3), TypeError, "method `judge"),
        (dict(preprocess_logits_for_metrics=max), ValueError, "nothing to work on"),
        (dict(model="./no/such/folder"), ValueError, "no folder './no/such/folder'"),
        (dict(model="the policy", processing_class="gpt2"), TypeError, "must be a tokenizer"),
        (dict(train_dataset=Dataset.from_list([{"text": "x"}])), ValueError, "prompt_column"),
        (dict(train_dataset=Dataset.from_list([{"prompt": "w1", "prompt_ids": 1}])), ValueError, "Rename them"),
        (dict(train_dataset=Dataset.from_list([{"prompt": "w1"}, {"prompt": ""}])), InvalidPromptError, "Row 1"),
    ],
)
def test_wrong_arguments_say_what_to_do(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        OnlineDPOTrainer(**arguments(tmp_path, **changes))


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (dict(use_vllm=True), ValueError, "`use_vllm` needs vllm, not installed here"),
        (
            dict(use_vllm=True, generation_kwargs={"no_repeat_ngram_size": 2}),
            ValueError,
            "no counterpart of `no_repeat",
        ),
        (dict(use_vllm=True, temperature=1e-3), ValueError, "at least 0.01"),
        (
            dict(use_vllm=True, vllm_mode="server", vllm_server_port=9, vllm_server_timeout=0.5),
            RolloutServerError,
            "http://localhost:9/health has failed",
        ),
        (
            dict(use_vllm=True, vllm_mode="server", vllm_server_base_url="localhost:8000"),
            ValueError,
            "begins with http://",
        ),
    ],
)
def test_vllm_that_cannot_be_used_is_found_before_a_model_is_loaded(tmp_path, fields, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, model="a/model-that-does-not-exist", **fields)


def test_fields_of_vllm_that_are_not_read_give_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="Ignored without `use_vllm`: vllm_server_port"):
        config(tmp_path, vllm_server_port=80)
    with pytest.warns(UserWarning, match="Ignored with `vllm_mode='colocate'`: vllm_server_port"):
        config(tmp_path, use_vllm=True, vllm_server_port=80)
    several = config(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url="http://a:1/, http://b:2")
    assert several.vllm_server_urls == ["http://a:1", "http://b:2"]
    assert config(tmp_path, vllm_mode="server").vllm_server_urls == ["http://localhost:8000"]


def test_a_context_that_is_too_short_is_found_before_training(tmp_path):
    with pytest.raises(ValueError, match="room for 128 tokens"):
        trainer(tmp_path, max_length=512)


def test_a_reward_function_that_misbehaves_is_named(tmp_path):
    def half_asleep(completions, **_):
        return [1.0]

    with pytest.raises(ScoringError, match="half_asleep"):
        trainer(tmp_path, reward_funcs=half_asleep).train()
