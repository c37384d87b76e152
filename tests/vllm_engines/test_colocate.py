"""What is particular to vLLM in the trainer's process."""

import random

import numpy as np
import pytest
import torch

from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.colocated_engine import VLLMColocateEngine, engine_options
from support import tiny, vllm_tools
from support.stages import sampler

OPTIONS = {"enforce_eager": True, "block_size": vllm_tools.BLOCK}
KEY = RolloutKey(seed=3, step=5)
PARAMS = SamplingParams(max_new_tokens=14, end_token_ids=(tiny.EOS, tiny.END, 9, 17))


def start(model, options=None, **fields):
    return VLLMColocateEngine(model, tiny.tokenizer(), vllm_tools.arguments(**fields), {**OPTIONS, **(options or {})})


def test_starting_leaves_the_random_states_alone_and_closing_the_process_group_as_it_was():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    model = vllm_tools.policy("qwen2-tied")
    torch.manual_seed(3)
    engine = start(model)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    with pytest.raises(AssertionError, match="sync comes before generate"):
        engine.generate(tiny.prompts([3]), 2, PARAMS, KEY)
    engine.sync(model, 7)
    groups = engine.generate(tiny.prompts([3]), 2, PARAMS, KEY)
    assert groups[0].completions[0].policy_version == 7
    engine.close()
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_workers_in_processes_of_their_own_get_the_weights_too(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # otherwise each worker wants a NUMA node of its own
    model, prompts = vllm_tools.policy("llama-untied"), tiny.prompts((3, 40, 70))
    engine = start(model, {"distributed_executor_backend": "mp"}, vllm_tensor_parallel_size=2)
    for version in (1, 2):
        vllm_tools.change_weights(model, version)
        engine.sync(model, version)
        groups = engine.generate(prompts, 3, PARAMS, KEY)
        assert vllm_tools.largest_error(model, groups) < 1e-4
        assert {c.policy_version for g in groups for c in g.completions} == {version}
    engine.close()


def test_sleep_mode_is_refused_without_a_gpu():
    with pytest.raises(ValueError, match="vllm_enable_sleep_mode"):
        start(vllm_tools.policy("qwen2-tied"), vllm_enable_sleep_mode=True)


def test_the_configuration_reaches_vllm():
    model = vllm_tools.policy("qwen2-tied")
    options = engine_options(model, vllm_tools.arguments(rollout_batch_size=17, vllm_model_impl="transformers"))
    assert options["max_num_seqs"] == 17 and options["model_impl"] == "transformers"
    assert options["dtype"] == "float32" and options["max_model_len"] == vllm_tools.MAX_LENGTH
    assert engine_options(model, vllm_tools.arguments(max_length=500))["max_model_len"] == 128  # the model's own limit
    assert "gpu_memory_utilization" not in engine_options(model, vllm_tools.arguments(vllm_gpu_memory_utilization=None))


def test_a_rank_without_prompts_samples_too():
    engine, model = start(vllm_tools.policy("qwen2-tied")), vllm_tools.policy("qwen2-tied")
    engine.sync(model, 1)
    assert engine.generate([], 3, PARAMS, KEY) == []
    assert len(engine.generate(tiny.prompts((3,)), 3, PARAMS, KEY)[0].completions) == 3
    engine.close()


def test_vllm_loads_and_samples_outside_of_the_trainers_mixed_precision():
    """Its own dtype is fp32 here: in autocast its log-probabilities would be those of bf16."""
    model = vllm_tools.policy("qwen2-tied")
    engine = start(model)
    made = sampler(vllm_tools.arguments(), model, autocast=lambda: torch.autocast("cpu", torch.bfloat16), engine=engine)
    made.sync(tiny.prompts((3, 7)), 0, 1)
    groups = made.sample(tiny.prompts((3, 40, 7)), 3, KEY)
    assert vllm_tools.largest_error(model, groups) < 1e-4
    engine.close()
