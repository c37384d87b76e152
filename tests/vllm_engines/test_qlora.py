"""A quantised policy: vLLM holds its base model without quantisation, and is sent the adapter alone."""

from __future__ import annotations

import logging

import pytest
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict

from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.colocated_engine import VLLMColocateEngine
from online_dpo.rollout.vllm.server_engine import VLLMServerEngine
from support import quantized, tiny, training, vllm_tools
from support.vllm_training import train

FAMILY = "llama-untied"
LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
OPTIONS = {"enforce_eager": True, "block_size": vllm_tools.BLOCK}
PARAMS = SamplingParams(max_new_tokens=14, end_token_ids=(tiny.EOS, tiny.END, 9, 17))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    process = vllm_tools.ServerProcess(FAMILY, tmp_path_factory.mktemp("q"), seed=0, options=["--lora-rank", "4"])
    yield process
    process.kill()


@pytest.fixture(scope="module")
def policy(served):
    base = prepare_model_for_kbit_training(quantized.loaded(str(served.model), quantized.NF4), False)
    return get_peft_model(base, LoraConfig(**LORA)).eval()


def unquantized(policy):
    """What the sampler should be: the base model without quantisation, with the same adapter."""
    model = get_peft_model(vllm_tools.policy(FAMILY), LoraConfig(**LORA))
    set_peft_model_state_dict(model, get_peft_model_state_dict(policy))
    return model.eval()


def make_engine(kind, policy, served):
    if kind == "colocate":
        return VLLMColocateEngine(policy, tiny.tokenizer(), vllm_tools.arguments(), OPTIONS)
    return VLLMServerEngine([served.url], tiny.tokenizer(), vllm_tools.arguments(vllm_server_timeout=120.0))


@pytest.mark.parametrize("kind", ["colocate", "server"])
def test_each_version_is_sampled_with_its_own_adapter_over_the_base_as_it_was_before(kind, policy, served):
    engine = make_engine(kind, policy, served)
    seen = []
    for version in (1, 2, 3):
        engine.sync(policy, version)
        groups = engine.generate(tiny.prompts((3, 40, 1, 7, 70)), 3, PARAMS, RolloutKey(seed=3, step=5))
        assert vllm_tools.largest_error(unquantized(policy), groups) < 1e-4
        assert {c.policy_version for g in groups for c in g.completions} == {version}
        seen.append([c.token_ids for g in groups for c in g.completions])
        vllm_tools.change_weights(policy, version, only_trainable=True)
    assert seen[0] != seen[1] != seen[2]
    engine.close()


@pytest.mark.parametrize("kind", ["colocate", "server"])
def test_training(tmp_path, served, kind, caplog):
    options = dict(vllm_mode=kind, sync_check_steps=1)
    options |= {} if kind == "colocate" else {"vllm_server_base_url": served.url}
    with caplog.at_level(logging.WARNING):
        log = train(
            tmp_path,
            model=str(served.model),
            model_init_kwargs={"quantization_config": quantized.NF4},
            peft_config=LoraConfig(**LORA),
            max_steps=2,
            **options,
        )
    assert [entry["pairs/count"] > 0 for entry in log] == [True, True]
    # what 4 bits change, and not more: a mean over all completions of a step
    assert all(1e-3 < entry["sampling/sampling_logp_difference/mean"] < 0.4 for entry in log)
    [told] = [r.getMessage() for r in caplog.records if "is quantised" in r.getMessage()]
    assert "(nf4)" in told


def test_a_server_for_whole_weights_is_refused_before_the_model_is_loaded(tmp_path, server):
    with pytest.raises(ValueError, match="takes whole weights.*adapter alone.*--lora-rank RANK"):
        training.trainer(
            tmp_path,
            model="never/loaded",
            model_init_kwargs={"quantization_config": quantized.NF4},
            kwargs={"peft_config": LoraConfig(**LORA)},
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=server.url,
        )
