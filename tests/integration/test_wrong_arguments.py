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
    "fields, message",
    [
        (dict(num_completions=1), "at least 2"),
        (dict(temperature=0.0), "above 0"),
        (dict(top_p=1.5), r"in \(0, 1\]"),
        (dict(beta=[0.1, -1.0]), "`beta`"),
        (dict(loss_type="dpo"), "one of sigmoid, ipo"),
        (dict(loss_type=["sigmoid", "dpo"]), "it is 'dpo'"),
        (dict(loss_type=[]), "at least one loss"),
        (dict(loss_type=["ipo", "ipo"]), "each once"),
        (dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0]), "names 2 losses"),
        (dict(loss_weights=[0.0]), "`loss_weights` must be finite numbers above 0"),
        (dict(label_smoothing=0.5), r"`label_smoothing` must be in \[0, 0.5\)"),
        (dict(label_smoothing_factor=0.1), "smoothed by `label_smoothing`"),
        (dict(loss_type="exo_pair"), "set `label_smoothing`, for example to 1e-3"),
        (dict(loss_type="sft", label_smoothing=0.1), "reads no labels"),
        (dict(simpo_gamma=-1.0), "`simpo_gamma` must be 0 or more"),
        (dict(dpop_lambda=float("inf")), "`dpop_lambda` must be 0 or more"),
        (dict(pair_selection="worst"), "best_worst, best_random"),
        (dict(min_margin=0.0), "`min_margin` must be above 0"),
        (dict(min_margin=2.0, max_margin=1.0), "no pair would be left"),
        (dict(max_length_ratio=0.5), "`max_length_ratio` must be 1 or more"),
        (dict(label_temperature=0.0), "`label_temperature` must be above 0"),
        (dict(tie_policy="first", margin_weighting=True), "without a margin, which `margin_weighting` needs"),
        (dict(tie_policy="random"), "skip, first"),
        (dict(sync_ref_model=True, ref_model_mixup_alpha=0.0), r"`ref_model_mixup_alpha` must be in \(0, 1\]"),
        (dict(sync_ref_model=True, ref_model_sync_steps=0), "`ref_model_sync_steps` must be at least 1"),
        (dict(max_length=64, max_new_tokens=64), "leaves no room for a prompt"),
        (dict(use_vllm=True, vllm_mode="serve"), "colocate, server"),
        (dict(use_vllm=True, vllm_structured_outputs_regex="a+"), "not in this version"),
        (dict(use_vllm=True, vllm_mode="server", vllm_server_timeout=0), "above 0"),
        (dict(use_vllm=True, vllm_mode="server", vllm_server_port=65536), "a port"),
        (dict(use_vllm=True, vllm_mode="server", vllm_server_base_url=" , "), "an address"),
        (dict(use_vllm=True, vllm_mode="server", vllm_weight_transfer="nccl"), "one of auto, broadcast, file, http"),
        (dict(use_vllm=True, vllm_mode="server", vllm_group_port=-1), "a port"),
        (dict(use_vllm=True, vllm_tensor_parallel_size=0), "at least 1"),
        (dict(use_vllm=True, vllm_gpu_memory_utilization=1.5), "at most 1"),
        (dict(max_staleness=-1), "`max_staleness` must be 0 or more"),
        (dict(sync_check_steps=-1), "`sync_check_steps` must be 0 or more"),
        (dict(remove_unused_columns=True), "remove_unused_columns"),
        (dict(generation_kwargs={"num_beams": 4}), "beam search"),
        (dict(missing_eos_penalty=-1.0), "missing_eos_penalty"),
        (dict(generation_kwargs={"temperature": 0.0}), "`temperature` must be above 0"),
        (dict(generation_kwargs={"no_repeat_ngram": 2}), "Did you mean `no_repeat_ngram_size`"),
        (dict(generation_kwargs={"typical_p": 0.5}), "typical_p"),
        (dict(auto_find_batch_size=True), "auto_find_batch_size"),
    ],
)
def test_wrong_configurations_say_what_to_do(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


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
