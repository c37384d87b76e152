"""A server that is sent adapters alone."""

import pytest
from peft import LoraConfig, get_peft_model

from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.server_engine import VLLMServerEngine
from support import tiny, vllm_tools
from support.vllm_training import check, train

FAMILY = "qwen2-tied"
KEY = RolloutKey(seed=3, step=5)
PARAMS = SamplingParams(max_new_tokens=14, end_token_ids=(tiny.EOS, tiny.END, 9, 17))


def connect(*urls):
    return VLLMServerEngine(urls, tiny.tokenizer(), vllm_tools.arguments(vllm_server_timeout=120.0))


def sample(engine):
    return engine.generate(tiny.prompts((3, 40, 1, 7, 70)), 3, PARAMS, KEY)


def versions(groups):
    return {c.policy_version for g in groups for c in g.completions}


def test_every_version_is_sampled_from_its_own_adapter_also_after_a_restart(adapter_server):
    engine, model = connect(adapter_server.url), vllm_tools.lora_policy(FAMILY)
    seen = []
    for version in (1, 2, 3):
        engine.sync(model, version)
        seen.append(sample(engine))
        assert vllm_tools.largest_error(model, seen[-1]) < 1e-4 and versions(seen[-1]) == {version}
        vllm_tools.change_weights(model, version, only_trainable=True)
    ids = [[c.token_ids for g in groups for c in g.completions] for groups in seen]
    assert ids[0] != ids[1] != ids[2]
    adapter_server.restart()
    assert sample(engine) == seen[-1]
    engine.sync(model, 4)
    assert vllm_tools.largest_error(model, sample(engine)) < 1e-4
    engine.close()


def test_an_adapter_of_another_name(adapter_server):
    model = get_peft_model(
        vllm_tools.policy(FAMILY), LoraConfig(r=8, lora_alpha=8, target_modules=["v_proj"]), adapter_name="mine"
    )
    vllm_tools.change_weights(model, 5, only_trainable=True)
    engine = connect(adapter_server.url)
    engine.sync(model.eval(), 1)
    assert vllm_tools.largest_error(model, sample(engine)) < 1e-4
    engine.close()


@pytest.mark.parametrize(
    "options, message",
    [
        (None, "all weights of the policy are trained"),
        (dict(r=16), "has rank 16; start the server with `--lora-rank 16` \\(it has 8\\)"),
        (dict(r=2, target_modules=["embed_tokens"]), "no adapter on an embedding"),
        (dict(r=2, modules_to_save=["lm_head"]), "no `modules_to_save`"),
        (dict(r=2, use_dora=True), "no DoRA"),
    ],
)
def test_policies_that_are_no_base_model_with_a_plain_adapter_are_refused(adapter_server, options, message):
    model = vllm_tools.policy(FAMILY)
    if options is not None:
        model = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], **options}))
    engine = connect(adapter_server.url)
    with pytest.raises(ValueError, match=message):
        engine.sync(model, 1)
    engine.close()


@pytest.mark.slow
def test_servers_of_both_kinds_are_refused(adapter_server, server):
    with pytest.raises(ValueError, match="Some servers take adapters"):
        connect(adapter_server.url, server.url)


@pytest.mark.parametrize("transfer", ["broadcast", "http"])
def test_adapters_go_as_files_only(adapter_server, transfer):
    args = vllm_tools.arguments(use_vllm=True, vllm_mode="server", vllm_weight_transfer=transfer, vllm_group_port=0)
    with pytest.raises(ValueError, match=f"read adapters as files, so `vllm_weight_transfer` cannot be '{transfer}'"):
        VLLMServerEngine([adapter_server.url], tiny.tokenizer(), args)


def test_training(tmp_path, adapter_server):
    served = dict(vllm_mode="server", vllm_server_base_url=adapter_server.url)
    check(train(tmp_path, model=vllm_tools.lora_policy(FAMILY), sync_check_steps=1, **served))
