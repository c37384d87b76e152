"""Compiled steps give the tokens of uncompiled ones, from few codes; what cannot be compiled is told once.

Dynamo's part is tested with a backend that runs what it is given, which takes seconds, and the whole once.
"""

import logging
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from online_dpo import OnlineDPOConfig
from online_dpo.rollout.builtin import compiled_steps, static_decoding
from online_dpo.rollout.builtin.compiled_steps import StepCompiler
from online_dpo.rollout.builtin.cuda_graphs import StepGraphs
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.registry import build_engine
from online_dpo.runs.events import listening
from support import tiny

PARAMS = SamplingParams(max_new_tokens=9, end_token_ids=(tiny.EOS, tiny.END, 9, 17))
SHARPNESS = 1.5
LAYERS = {"gpt2": "n_layer"}
VARIANTS = 4
"""Codes for a layer: several completions of a prompt or one, in a part of the cache or in all of it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(static_decoding, "SLOT_MULTIPLE", 4)
    monkeypatch.setattr(compiled_steps, "BACKEND", "eager")
    torch._dynamo.reset()
    compiled_steps._compiled.cache_clear()
    counters.clear()
    with torch.backends.mkldnn.flags(enabled=False):  # packed weights of a CPU are in a layout the compiler cannot read
        yield
    torch._dynamo.reset()


def engine(model, compiled):
    return TransformersEngine(model, tiny.tokenizer(), static_steps=True, compile_steps=compiled)


def policy(family="qwen2", layers=3, lora=False):
    model = tiny.causal_lm(family, sharpness=SHARPNESS, **{LAYERS.get(family, "num_hidden_layers"): layers})
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    return model


def completions(sampler, lengths=(3, 11, 7), k=2, params=PARAMS):
    groups = sampler.generate(tiny.prompts(lengths), k, params, RolloutKey(3, 5))
    return [c for group in groups for c in group.completions]


def assert_same(found, expected, atol=1e-5):
    for mine, other in zip(found, expected, strict=True):
        assert mine.token_ids == other.token_ids
        assert mine.logprobs == pytest.approx(other.logprobs, abs=atol)


OTHER_FAMILIES = [pytest.param(family, marks=pytest.mark.slow) for family in ("gemma2", "mistral")]


@pytest.mark.parametrize("family", ["qwen2", "gpt2", *OTHER_FAMILIES])
def test_compiled_layers_sample_the_same_and_all_of_a_kind_share_their_code(family, caplog):
    model = policy(family, layers=4)
    expected = completions(engine(model, compiled=False))
    with caplog.at_level(logging.WARNING):
        sampler = engine(model, compiled=True)
        assert_same(completions(sampler), expected)
    assert caplog.records == [] and sampler._compiler.wanted
    kinds = 2 if family == "gemma2" else 1  # of attention
    draws = 2
    assert 0 < counters["stats"]["unique_graphs"] <= kinds * VARIANTS + draws
    completions(engine(policy(family, layers=5), compiled=True))
    assert counters["stats"]["unique_graphs"] <= kinds * VARIANTS + draws, "also with another model of these sizes"


@pytest.mark.parametrize("lora", [False, True])
def test_replaced_linear_layers_are_inputs_and_no_constants_of_a_code(lora):
    model = policy(layers=4, lora=lora)
    with torch.autocast("cpu", torch.bfloat16):
        expected, sampler = completions(engine(model, compiled=False)), engine(model, compiled=True)
        found = completions(sampler)
        assert sampler._compiler.wanted
        assert counters["stats"]["unique_graphs"] <= VARIANTS + 2
        assert_same(found, expected, atol=0.02)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2)
        assert_same(completions(sampler), completions(engine(model, compiled=False)), atol=0.02)
    assert all("forward" not in vars(module) for module in model.modules())


class Unreadable(torch.nn.Module):
    @torch._dynamo.disable
    def forward(self, x):
        return torch.nn.functional.silu(x)


def break_the_graph(model):
    model.model.layers[1].mlp.act_fn = Unreadable()


def own_forward(model):
    layer = model.model.layers[0]
    layer.forward = partial(type(layer).forward, layer)


def compile_before(model):
    model.model.layers[0].compile(backend="eager")


@pytest.mark.parametrize(
    "change, reason",
    [
        (break_the_graph, "Unsupported"),
        (own_forward, "owns the `forward` of the model's layers"),
        (compile_before, "the model is compiled already"),
    ],
)
def test_what_cannot_be_compiled_is_told_once_and_sampled_as_it_is(change, reason, caplog):
    model = policy()
    expected = completions(engine(model, compiled=False))
    change(model)
    with caplog.at_level(logging.WARNING):
        sampler = engine(model, compiled=True)
        assert_same(completions(sampler), expected)
        assert_same(completions(sampler), expected)
    [record] = [r for r in caplog.records if r.name.startswith("online_dpo")]
    assert "Sampling steps are not compiled" in record.getMessage() and reason in record.getMessage()
    assert sampler._path == "static", "with graphs all the same"


def sampled_with_one_warning(caplog):
    """An engine whose steps were to be compiled, after it has sampled what others sample; and what it told."""
    model = policy()
    expected = completions(engine(model, compiled=False))
    with caplog.at_level(logging.WARNING):
        sampler = engine(model, compiled=True)
        assert_same(completions(sampler), expected)
    [record] = [r for r in caplog.records if r.name.startswith("online_dpo")]
    return sampler, record.getMessage()


def test_too_many_codes_are_told(monkeypatch, caplog):
    monkeypatch.setattr(compiled_steps, "MOST_CODES", 1)
    _, told = sampled_with_one_warning(caplog)
    assert "Sampling steps are not compiled" in told and "more than 1 codes" in told


def test_compiled_steps_that_are_wrong_are_found_by_the_trial(monkeypatch, caplog):
    def wrong(graph, inputs):
        return lambda *args: [x * 1.5 if x.is_floating_point() else x for x in graph(*args)]

    monkeypatch.setattr(compiled_steps, "BACKEND", wrong)
    sampler, told = sampled_with_one_warning(caplog)
    assert "not compiled" in told and "log-probabilities differ" in told
    assert sampler._path == "static"


def test_an_error_of_memory_is_no_failure_to_compile():
    def step():
        raise torch.OutOfMemoryError("no room")

    compiler = StepCompiler(wanted=True)
    with pytest.raises(torch.OutOfMemoryError):
        compiler.run(step)
    assert compiler.wanted


def test_how_long_the_first_step_took_is_told_once():
    told, compiler = [], StepCompiler(wanted=True)
    with listening(told.append):
        assert compiler.run(lambda: 3) == compiler.run(lambda: 3) == 3
        StepCompiler(wanted=False).run(lambda: 3)
    [event] = told
    assert event.kind == "compilation" and 0 <= event.facts["seconds"] < 1
    assert event.message == "The first compiled sampling step was ready in 0 s."


def test_it_is_for_gpus_and_the_configuration_turns_it_off(tmp_path):
    assert not TransformersEngine(tiny.causal_lm(), tiny.tokenizer())._compiler.wanted, "not on a CPU"
    assert not StepGraphs().compiler.wanted
    args = OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], compile_sampling=False)
    assert not build_engine(tiny.causal_lm(), tiny.tokenizer(), args)._compiler.wanted


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_with_the_compiler_that_a_gpu_uses(autocast, monkeypatch, caplog):
    monkeypatch.setattr(compiled_steps, "BACKEND", "inductor")
    model = policy(layers=2)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        expected = completions(engine(model, compiled=False), lengths=(3, 5), k=2)
        with caplog.at_level(logging.WARNING):
            found = completions(engine(model, compiled=True), lengths=(3, 5), k=2)
    assert caplog.records == []
    same = [mine.token_ids == other.token_ids for mine, other in zip(found, expected, strict=True)]
    assert all(same) or (autocast and sum(same) >= 2), "rounding may turn a draw"
    for mine, other, equal in zip(found, expected, same, strict=True):
        if equal:
            assert mine.logprobs == pytest.approx(other.logprobs, abs=0.03 if autocast else 1e-5)
