"""What a session is recorded with holds no secret, and settings are a run file."""

import json

import pytest
import yaml

from online_dpo import OnlineDPOConfig
from online_dpo.training.session_facts import environment_facts, settings_of, without_secrets


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train", "run.yaml"], ["train", "run.yaml"]),
        (["--hub_token", "abc", "--beta", "0.1"], ["--hub_token", "***", "--beta", "0.1"]),
        (["--hub-token=abc"], ["--hub-token=***"]),
        (["--hub-token=abc", "run.yaml"], ["--hub-token=***", "run.yaml"]),
        (["train.py", "hub_token=abc", "beta=0.1"], ["train.py", "hub_token=***", "beta=0.1"]),
        (["--api_key", "a", "b"], ["--api_key", "***", "***"]),
        (["--max_new_tokens", "64"], ["--max_new_tokens", "64"]),
        (["http://me:pass@host/"], ["http://host/"]),
        (["--url=https://host/?token=abc"], ["--url=https://host/"]),
        (["sk-abcdefghij", "x=hf_abcdefghij"], ["***", "x=***"]),
    ],
)
def test_a_command_is_shown_without_secrets(words, shown):
    assert without_secrets(words) == shown


def test_settings_are_what_differs_from_the_defaults_without_tokens(tmp_path):
    args = OnlineDPOConfig(str(tmp_path), use_cpu=True, beta=0.3, hub_token="hf_abcdefghij", run_name="a: b")
    text = settings_of(args, {"model": "Tiny,\nmade here"})
    settings = yaml.safe_load(text)
    assert (settings["beta"], settings["run_name"], settings["use_cpu"]) == (0.3, "a: b", True)
    assert "hf_abcdefghij" not in text and "num_completions" not in settings
    assert text.startswith("# model: Tiny, made here\n")
    assert OnlineDPOConfig(**settings).beta == 0.3


def test_the_environment_is_json():
    facts = environment_facts(2, ["online-dpo", "train", "--hub_token", "abc"])
    assert json.loads(json.dumps(facts)) == facts
    assert facts["processes"] == 2 and facts["command"] == "online-dpo train --hub_token '***'"
    assert facts["versions"].keys() >= {"online_dpo", "torch", "transformers"}
