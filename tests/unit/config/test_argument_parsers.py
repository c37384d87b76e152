"""`HfArgumentParser` and TRL's parser read the configuration from a command line and a file as Python would take it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from online_dpo import OnlineDPOConfig
from online_dpo.cli.runfile.schema import config_classes, read_fields_of

SAMPLES: dict[str, tuple[list[str], Any]] = {
    "num_completions_to_print": (["3"], 3),
    "learning_rate": (["1e-6"], 1e-6),
    "logging_steps": (["0.5"], 0.5),
    "gradient_checkpointing": (["false"], False),
    "bf16": ([], True),
    "share_prompts": (["no"], False),
    "flex_attention": (["false"], False),
    "max_tokens_per_pass": (["2048"], 2048),
    "remove_unused_columns": (["false"], False),
    "num_completions": (["4"], 4),
    "max_new_tokens": (["32"], 32),
    "max_length": (["256"], 256),
    "max_prompt_length": (["100"], 100),
    "truncate_prompts": (["false"], False),
    "temperature": (["0.7"], 0.7),
    "top_p": (["0.95"], 0.95),
    "top_k": (["50"], 50),
    "min_p": (["0.05"], 0.05),
    "repetition_penalty": (["1.1"], 1.1),
    "generation_kwargs": (['{"stop_strings": ["\\n\\n", "5"]}'], {"stop_strings": ["\n\n", "5"]}),
    "cache_implementation": (["static"], "static"),
    "rollout_batch_size": (["8"], 8),
    "cuda_graphs": (["false"], False),
    "compile_sampling": (["false"], False),
    "max_staleness": (["2"], 2),
    "sync_check_steps": (["7"], 7),
    "prompt_column": (["question"], "question"),
    "prompt_template": (["Q: {question} 100%"], "Q: {question} 100%"),
    # transformers' own reading of JSON text would make a number and a truth value of these texts
    "chat_template_kwargs": (['{"year": "2024", "think": "true"}'], {"year": "2024", "think": "true"}),
    "invalid_prompts": (["filter"], "filter"),
    "dataset_num_proc": (["2"], 2),
    "max_skipped_steps": (["3"], 3),
    "skipped_step_lr_factor": (["0.5"], 0.5),
    "skipped_step_lr_recovery": (["7"], 7),
    "max_idle_steps": (["9"], 9),
    "stop_timeout": (["3.5"], 3.5),
    "model_init_kwargs": (['{"dtype": "bfloat16"}'], {"dtype": "bfloat16"}),
    "trust_remote_code": ([], True),
    "ds3_gather_for_generation": (["true"], True),
    "reward_model_path": (["owner/reward"], "owner/reward"),
    "reward_weights": (["1", "-0.5"], [1.0, -0.5]),
    "reward_normalization": (["group"], "group"),
    "reward_batch_size": (["4"], 4),
    "reward_model_sharding": (["shard"], "shard"),
    "reward_timeout": (["2.5"], 2.5),
    "human_timeout": (["60"], 60.0),
    "run_folder": ([], True),
    "log_completions": (["4"], 4),
    "log_completions_max_mb": (["100"], 100),
    "resume_anyway": ([], True),
    "overwrite_output_dir": ([], True),
    "max_failure_share": (["0.5"], 0.5),
    "missing_eos_penalty": (["1.5"], 1.5),
    "length_penalty": (["0.01"], 0.01),
    "judge_top": (["2"], 2),
    "pair_selection": (["all_pairs"], "all_pairs"),
    "min_margin": (["0.1"], 0.1),
    "max_margin": (["2"], 2.0),
    "max_length_ratio": (["1.5"], 1.5),
    "margin_weighting": ([], True),
    "label_temperature": (["2"], 2.0),
    "tie_policy": (["first"], "first"),
    "resample_rounds": (["2"], 2),
    "eval_reward_model_path": (["owner/gold"], "owner/gold"),
    "overoptimisation": (["off"], "off"),
    "overoptimisation_patience": (["2"], 2),
    "beta": (["0.2"], 0.2),
    "loss_type": (["ipo"], "ipo"),
    "loss_weights": (["2"], [2.0]),
    "label_smoothing": (["0.1"], 0.1),
    "simpo_gamma": (["0.7"], 0.7),
    "dpop_lambda": (["10"], 10.0),
    "use_weighting": ([], True),
    "reference_free": (["false"], False),
    "sync_ref_model": ([], True),
    "ref_model_mixup_alpha": (["0.3"], 0.3),
    "ref_model_sync_steps": (["16"], 16),
    "disable_dropout": (["false"], False),
    "engine": (["transformers"], "transformers"),
    "method": (["xpo"], "xpo"),
    "xpo_alpha": (["1e-4", "1e-5"], [1e-4, 1e-5]),
    "mixture_coef": (["0.25"], 0.25),
    "target_kl": (["6"], 6.0),
    "beta_gain": (["0.2"], 0.2),
    "beta_range": (["5"], 5.0),
    "use_vllm": ([], True),
    "vllm_mode": (["server"], "server"),
    "vllm_model_impl": (["transformers"], "transformers"),
    "vllm_gpu_memory_utilization": (["0.3"], 0.3),
    "vllm_tensor_parallel_size": (["2"], 2),
    "vllm_enable_sleep_mode": ([], True),
    "vllm_server_base_url": (["http://a:1,http://b:2"], "http://a:1,http://b:2"),
    "vllm_server_host": (["10.0.0.1"], "10.0.0.1"),
    "vllm_server_port": (["8001"], 8001),
    "vllm_server_timeout": (["10"], 10.0),
    "vllm_weight_transfer": (["http"], "http"),
    "vllm_group_port": (["0"], 0),
    "vllm_structured_outputs_regex": (["a+"], "a+"),
}
SEVERAL: dict[str, tuple[list[str], Any]] = {
    "beta": (["0.2", "0.1"], [0.2, 0.1]),
    "loss_type": (["sigmoid", "sft"], ["sigmoid", "sft"]),
    "reward_normalization": (["none", "group"], ["none", "group"]),
    "mixture_coef": (["0.5", "0.25"], [0.5, 0.25]),
}
BASE = {"output_dir": "out", "use_cpu": True}


def own_fields() -> list[dataclasses.Field[Any]]:
    ours = {name for module, cls in config_classes() for name in read_fields_of(module, cls)}
    return [field for field in dataclasses.fields(OnlineDPOConfig) if field.name in ours]


def made(**fields: Any) -> OnlineDPOConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options that are not read without another one
        return OnlineDPOConfig(**BASE, **fields)


@pytest.fixture(scope="module")
def parser() -> HfArgumentParser:
    return HfArgumentParser(OnlineDPOConfig)  # pyright: ignore[reportArgumentType]


def parsed(parser: HfArgumentParser, *words: str) -> OnlineDPOConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parser.parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", *words])[0]


def test_every_field_of_ours_has_a_sample() -> None:
    assert {field.name for field in own_fields()} == set(SAMPLES)


def test_defaults_are_those_of_python(parser: HfArgumentParser) -> None:
    given, meant = parsed(parser), made()
    for field in own_fields():
        value = getattr(given, field.name)
        assert value == getattr(meant, field.name) and type(value) is type(getattr(meant, field.name)), field.name


@pytest.mark.parametrize(
    ("name", "words", "value"),
    [(name, *sample) for table in (SAMPLES, SEVERAL) for name, sample in table.items()],
)
def test_a_field_on_the_command_line_is_what_python_gives(
    parser: HfArgumentParser, name: str, words: list[str], value: Any
) -> None:
    given, meant = parsed(parser, f"--{name}", *words), made(**{name: value})
    for field in own_fields():  # the field, and none beside it
        assert getattr(given, field.name) == getattr(meant, field.name), field.name
    assert getattr(given, name) == value
    assert type(getattr(given, name)) is type(value)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for table in (SAMPLES, SEVERAL) for name, (_, value) in table.items()]
)
def test_a_field_in_a_file_of_trl_s_parser_is_what_python_gives(tmp_path: Path, name: str, value: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**BASE, name: value}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        [given] = TrlParser(OnlineDPOConfig).parse_args_and_config(["--config", str(file)])
    assert getattr(given, name) == getattr(made(**{name: value}), name) == value


def test_what_yaml_reads_as_something_else(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\nuse_cpu: true\noveroptimisation: off\nbeta: [1e-1, 5e-2]\nlearning_rate: 1e-6\n")
    [given] = TrlParser(OnlineDPOConfig).parse_args_and_config(["--config", str(file)])
    assert (given.overoptimisation, given.beta, given.learning_rate) == ("off", [0.1, 0.05], 1e-6)


def test_trl_s_scripts_parse_it_beside_their_own_classes(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "dataset_name: owner/data\nmodel_name_or_path: owner/model\ndtype: bfloat16\nload_in_4bit: true\n"
        "use_peft: true\noutput_dir: out\nuse_cpu: true\nreward_model_path: owner/reward\nbeta: 0.3\n"
    )
    parser = TrlParser((ScriptArguments, OnlineDPOConfig, ModelConfig, DatasetMixtureConfig))  # pyright: ignore
    words = ["--config", str(file), "--learning_rate", "2e-6", "--max_length", "None"]
    script, training, model, _ = parser.parse_args_and_config(words)
    assert (script.dataset_name, model.dtype, model.load_in_4bit) == ("owner/data", "bfloat16", True)
    assert (training.beta, training.learning_rate, training.max_length) == (0.3, 2e-6, None)
    assert training.reward_model_path == "owner/reward"


def test_help_is_what_stands_beneath_the_field(parser: HfArgumentParser) -> None:
    for field in own_fields():
        assert len(field.metadata["help"]) > 10, field.name
    text = " ".join(parser.format_help().split())  # a lone % in a help text would raise
    assert "Completions sampled for each prompt (K). `pair_selection` says how many pairs are formed of them." in text
    assert "--tie_policy {skip,first}" in text


def test_fields_of_transformers_stay_as_they_are() -> None:
    ours = {field.name for field in own_fields()}
    theirs = {field.name: field.metadata for field in dataclasses.fields(TrainingArguments)}
    assert "learning_rate" in ours & theirs.keys()
    assert theirs["learning_rate"]["help"] == "The initial learning rate for the optimizer."
    for field in dataclasses.fields(OnlineDPOConfig):
        if field.name in theirs and field.name not in ours:
            assert field.metadata is theirs[field.name]


@pytest.mark.smoke
def test_configurations_are_copied_and_pickled() -> None:
    args = made(loss_type=["sigmoid", "sft"])
    for other in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert other.to_dict() == args.to_dict()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("generation_kwargs", "stop=x", "`generation_kwargs` must be a dict, or a JSON object as text; it is .stop=x"),
        ("model_init_kwargs", "[1]", r"`model_init_kwargs` must be a dict"),
        ("reward_weights", ["a"], r"`reward_weights` must hold numbers; it holds 'a'"),
        ("beta", "much", r"`beta` must hold numbers; it holds 'much'"),
    ],
)
def test_text_that_is_no_value_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**{field: value})
