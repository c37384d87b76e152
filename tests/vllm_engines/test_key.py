"""A real server that was started with a key: what a stranger gets, and the trainer who has it."""

import json
import urllib.error
import urllib.request

import pytest

from online_dpo.errors import RolloutServerError
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.server_engine import VLLMServerEngine
from support import tiny, vllm_tools

PARAMS = SamplingParams(max_new_tokens=6, end_token_ids=(tiny.EOS, tiny.END))
PATHS = ("/collective_rpc", "/pause", "/v1/completions", "/v1/load_lora_adapter", "/get_world_size", "/metrics")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "sk-1")
        process = vllm_tools.ServerProcess("qwen2-tied", tmp_path_factory.mktemp("guarded"))
        arguments = vllm_tools.arguments(vllm_server_timeout=120.0, vllm_weight_transfer="broadcast", vllm_group_port=0)
        yield process, VLLMServerEngine([process.url], tiny.tokenizer(), arguments)
    process.kill()


def test_the_trainer_with_the_key_sends_weights_and_samples(guarded):
    _, engine = guarded
    model = vllm_tools.policy("qwen2-tied")
    engine.sync(model, 1)
    groups = engine.generate(tiny.prompts((3, 40)), 2, PARAMS, RolloutKey(seed=3, step=5))
    assert vllm_tools.largest_error(model, groups) < 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_a_stranger_reaches_nothing(guarded, path):
    process, _ = guarded
    body = json.dumps({"method": "online_dpo_device", "args": []}).encode()
    for key in ({}, {"Authorization": "Bearer sk-2"}):
        request = urllib.request.Request(process.url + path, body, {"Content-Type": "application/json", **key})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=120)
        assert caught.value.code == 401


def test_a_trainer_without_the_key_is_told_what_to_set(guarded, monkeypatch):
    process, _ = guarded
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(RolloutServerError, match="401.*Set VLLM_API_KEY to the key"):
        VLLMServerEngine([process.url], tiny.tokenizer(), vllm_tools.arguments(vllm_server_timeout=60.0))
