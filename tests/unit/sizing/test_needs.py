"""The terms together: what takes turns, and what does not."""

import pytest

from online_dpo.sizing.needs import memory_needs
from online_dpo.sizing.plan import Plan
from online_dpo.sizing.shape import MODELS, as_reward_model

GIB = 2**30
SEVEN = MODELS["7B"]


def gpu(**options):
    return memory_needs(Plan(SEVEN, **{"sharding": "fsdp2", "gpus": 8, **options})).gpu


def named(terms):
    return {term.name: term.gpu for term in terms}


@pytest.mark.smoke
def test_sampling_and_training_take_turns():
    needs = memory_needs(Plan(SEVEN, "fsdp2", gpus=8))
    held, sampling, training = (sum(named(part).values()) for part in (needs.held, needs.sampling, needs.training))
    assert 0 < training < sampling
    assert needs.gpu == held + sampling
    assert gpu(engine="servers") == held + training


def test_the_built_in_engine_gathers_the_whole_policy_or_layer_by_layer():
    whole, layers = (named(memory_needs(Plan(SEVEN, "fsdp2", gpus=8, gathers=g)).sampling) for g in ("whole", "layers"))
    assert whole["gathered weights"] == 2 * SEVEN.parameters
    assert layers["gathered weights"] == 2 * 152064 * 3584  # the head is larger than two layers
    assert whole["keys and values"] == layers["keys and values"]


def test_vllm_in_process_stays_while_training():
    assert gpu(engine="vllm", vllm_share=0.25, gpu_bytes=80 * GIB) == gpu(engine="servers") + 20 * GIB


@pytest.mark.parametrize(("sharded", "share"), [(False, 1), (True, 8)])
def test_a_reward_model_is_whole_on_every_gpu_or_sharded(sharded, share):
    reward_model = as_reward_model(SEVEN)
    more = gpu(reward_model=reward_model, reward_model_sharded=sharded) - gpu()
    assert more == pytest.approx(2 * reward_model.parameters / share, rel=1e-5)


def test_an_adapter_needs_no_second_model():
    names = {a: set(named(memory_needs(Plan(SEVEN, adapter=a)).held)) for a in ("none", "lora", "qlora")}
    assert "reference" in names["none"] and names["lora"] == names["qlora"] == {"weights", "optimizer"}


def test_copies_of_linear_layers_are_cast_merged_or_computed_together():
    def copies(**options):
        return named(memory_needs(Plan(SEVEN, **options)).sampling).get("copies of linear layers", 0)

    linears = sum(w.numbers * w.count for w in SEVEN.weights() if w.linear)
    in_layers = linears - SEVEN.vocabulary * SEVEN.hidden
    together = in_layers - SEVEN.layers * SEVEN.hidden * (SEVEN.heads * SEVEN.head_dim + SEVEN.intermediate)
    assert copies() == 2 * linears and copies(adapter="lora") == 2 * in_layers
    assert copies(bf16=False) == 4 * together and copies(sharding="zero2", gpus=8) == 2 * together
    assert copies(adapter="qlora") == copies(sharding="zero3", gpus=8) == copies(bf16=False, on_cpu=True) == 0


def test_deepspeeds_step_copies_its_part_of_the_gradients_in_fp32():
    thirty_two = MODELS["32B"]
    needs = memory_needs(Plan(thirty_two, "zero2", gpus=2, tokens_per_pass=1024, engine="servers"))
    held, training, stepping = (sum(named(part).values()) for part in (needs.held, needs.training, needs.stepping))
    assert stepping == pytest.approx((2 + 4) * thirty_two.parameters / 2, rel=1e-6) and stepping > training
    assert needs.gpu == held + stepping


def test_an_offloaded_reference_is_on_the_machine():
    names = {t.name: t for t in memory_needs(Plan(SEVEN, "zero3", gpus=8, offload_parameters=True)).held}
    assert names["reference"].gpu == 0 and names["reference"].host == pytest.approx(SEVEN.parameters / 4, rel=1e-6)
