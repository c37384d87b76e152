"""Products with copies of weights: adapters merged, layers of one input together, against the layers themselves."""

import logging
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from online_dpo.modeling.borrowing import adapter_off
from online_dpo.rollout.builtin.engine import DYNAMIC, TransformersEngine
from online_dpo.rollout.builtin.linear_copies import LinearCopies
from online_dpo.rollout.builtin.linear_layers import inputs_by_layer, linear_layers, siblings
from online_dpo.rollout.builtin.merged_adapters import dithered
from online_dpo.rollout.params import RolloutKey, SamplingParams
from support import tiny

IDS = torch.arange(4, 14).view(2, 5)
PARAMS = SamplingParams(max_new_tokens=12, end_token_ids=(tiny.EOS,))
KEY = RolloutKey(seed=3, step=5)
ALL = dict(target_modules="all-linear", task_type="CAUSAL_LM")
SOME = dict(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def shaken(model, scale=0.05):
    """A model whose trained weights have moved, so that what an adapter starts with (nothing) hides no fault."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def with_adapter(config, family="qwen2", **overrides):
    return shaken(get_peft_model(tiny.causal_lm(family, sharpness=1.0, **overrides), config))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def merged_logits(model, copies):
    with copies.in_use(model):
        return logits(model)


def state(model):
    flags = [(m.merged_adapters[:], m.disable_adapters) for m in model.modules() if hasattr(m, "merged_adapters")]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, flags


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def products(model, copies=None):
    """How many a forward pass has, those that bring copies up to date left out."""
    with nullcontext() if copies is None else copies.in_use(model), Products() as counted:
        logits(model)
    return counted.count


MERGED = {
    "lora": LoraConfig(r=4, **ALL),
    "some layers": LoraConfig(r=4, **SOME),
    "rank-stabilised": LoraConfig(r=4, use_rslora=True, **SOME),
    "dora": LoraConfig(r=4, use_dora=True, **SOME),
    "patterns": LoraConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}, lora_dropout=0.3, **SOME),
    "biases": LoraConfig(r=4, bias="lora_only", **SOME),
    "bias of its own": LoraConfig(r=4, lora_bias=True, target_modules=["q_proj", "v_proj"]),
    "whole modules": LoraConfig(r=4, modules_to_save=["lm_head"], **SOME),
    "embeddings": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "adalora": AdaLoraConfig(total_step=10, **SOME),
    "loha": LoHaConfig(r=4, **SOME),
    "lokr": LoKrConfig(r=4, **SOME),
    "oft": OFTConfig(r=4, oft_block_size=0, **SOME),
    "vera": VeraConfig(r=4, **SOME),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MERGED)
def test_an_adapter_of_any_kind_is_merged_into_the_copies_and_not_into_the_model(kind):
    model, copies = with_adapter(MERGED[kind]), LinearCopies()
    expected, before = logits(model), state(model)
    torch.testing.assert_close(merged_logits(model, copies), expected, atol=2e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), state(model)[0].values(), strict=True))
    assert state(model)[1] == before[1]
    assert torch.equal(logits(model), expected), "outside it computes as before"
    of_embeddings = kind == "embeddings"  # which are looked up, and stay as they are
    assert products(model, copies) == 2 * 4 + 1 + of_embeddings, "QKV, output, gate and up, down; and the head"


def test_weights_that_change_are_in_the_copies_of_the_next_call_at_the_same_addresses():
    model, copies = with_adapter(LoraConfig(r=4, **ALL)), LinearCopies()
    merged_logits(model, copies)
    addresses = [product.weight.data_ptr() for product in copies._products]
    forwards = dict(copies._forwards)
    for _ in range(2):
        shaken(model)
        torch.testing.assert_close(merged_logits(model, copies), logits(model), atol=2e-5, rtol=1e-5)
    assert [product.weight.data_ptr() for product in copies._products] == addresses
    assert copies._forwards == forwards, "compiled code is kept for as long as it finds the same functions"


def test_within_a_call_the_copies_are_made_once():
    model, copies = with_adapter(LoraConfig(r=4, **ALL)), LinearCopies()
    with copies.one_call():
        first = merged_logits(model, copies)
        shaken(model)
        assert torch.equal(merged_logits(model, copies), first)
        copies.release()
        torch.testing.assert_close(merged_logits(model, copies), logits(model), atol=2e-5, rtol=1e-5)
    with copies.one_call():
        torch.testing.assert_close(merged_logits(model, copies), logits(model), atol=2e-5, rtol=1e-5)


def test_adapters_that_are_several_or_off_or_merged_or_other_ones():
    model, copies = with_adapter(LoraConfig(r=4, **SOME)), LinearCopies()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False))
    seen = []

    def check():
        expected = logits(model)
        torch.testing.assert_close(merged_logits(model, copies), expected, atol=2e-5, rtol=1e-5)
        seen.append(expected)

    check()
    model.base_model.set_adapter(["default", "second"])
    check()
    model.set_adapter("second")
    check()
    with adapter_off(model):
        check()
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(seen) for b in seen[:i])
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    check()
    torch.testing.assert_close(seen[-1], seen[1], atol=2e-5, rtol=1e-5)
    with adapter_off(model):  # the layers take the adapters out of the weights in their next call
        torch.testing.assert_close(merged_logits(model, copies), seen[3], atol=2e-5, rtol=1e-5)
    for layer in model.modules():
        if isinstance(vars(layer).get("scaling"), dict):
            layer.scaling = {name: 3 * value for name, value in layer.scaling.items()}
    check()


def test_what_cannot_be_merged_is_told_and_computed_as_it_is(caplog):
    for config, reason in (
        (IA3Config(feedforward_modules=["down_proj"], **SOME), "does not say what it adds to the weights"),
        (LoraConfig(r=4, alora_invocation_tokens=[5], **SOME), "aLoRA does not support merging"),
    ):
        model, copies = with_adapter(config), LinearCopies()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "online_dpo"):
            for _ in range(2):
                torch.testing.assert_close(merged_logits(model, copies), logits(model), atol=2e-5, rtol=1e-5)
        [record] = caplog.records
        assert "Adapters are not merged" in record.getMessage() and f"{reason}" in record.getMessage()
        assert "(6 layers)" in record.getMessage()


def test_hooks_inside_of_an_adapter_are_not_passed_over(caplog):
    model, copies = with_adapter(LoraConfig(r=4, **SOME)), LinearCopies()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A.default.register_forward_hook(lambda module, args, output: 2 * output)
    outer = model.base_model.model.model.layers[1].self_attn.q_proj
    outer.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(merged_logits(model, copies), logits(model), atol=2e-5, rtol=1e-5)
    assert "hooks are registered inside of the adapter (1 layers)" in caplog.text


def test_bf16_autocast_differs_by_rounding_only():
    model, copies = with_adapter(LoraConfig(r=4, **ALL)), LinearCopies()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = logits(model), merged_logits(model, copies)
    exact = logits(model)
    assert (found - exact).abs().mean() < 1.5 * (expected - exact).abs().mean(), "merged weights are rounded once"
    assert {product.weight.dtype for product in copies._products} == {torch.bfloat16}


def test_small_updates_of_weights_in_bf16_are_not_rounded_away():
    """The first steps of an adapter are smaller than half of the last bit of weights that were loaded in bf16."""
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(512, 512)).bfloat16().float()
    update = 0.5e-5 * torch.randn(512, 4) @ torch.randn(4, 512)
    nearest, kept = (weight + update).bfloat16().float() - weight, dithered(weight + update, torch.bfloat16) - weight
    share = [float((change * update).sum() / (update * update).sum()) for change in (nearest, kept)]
    assert share[0] < 0.5 and share[1] == pytest.approx(1, abs=0.1)
    assert torch.equal(dithered(weight, torch.bfloat16), weight)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = dithered(weight + 100 * update, dtype).to(dtype).float()
        step = torch.finfo(dtype).eps * (weight + 100 * update).abs() + 1e-7  # fp16 has few bits below 6e-5
        assert bool(((rounded - weight - 100 * update).abs() <= step).all())

    model, copies = with_adapter(LoraConfig(r=4, **ALL)), LinearCopies()
    model.base_model.model.bfloat16()
    with copies.in_use(model):
        [product] = [p for p in copies._products if len(p.layers) == 3][:1]
        base = product.layers[0].base.weight
        assert (product.weight[: len(base)].float() - base.float()).abs().max() > 0


FOUND = {
    "llama": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "qwen2": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "qwen3": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "gemma2": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FOUND)
def test_layers_that_read_the_same_input_are_found_by_looking(family, lora):
    model = tiny.causal_lm(family)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, **ALL)).eval()
    names = {module: name for name, module in model.named_modules()}
    layers, left = linear_layers(model)
    groups = siblings(model, layers, inputs_by_layer(model, layers, None))
    found = [" ".join(names[each.layer].rpartition(".")[2] for each in group) for group in groups]
    assert found == [*FOUND[family] * 2, "lm_head"] and not left


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_computes_the_same_with_fewer_products(family):
    model, copies = tiny.causal_lm(family, sharpness=1.0), LinearCopies()
    torch.testing.assert_close(merged_logits(model, copies), logits(model), atol=2e-5, rtol=1e-5)
    assert products(model, copies) == 2 * 4 + 1
    if family == "qwen2":
        assert products(model) == 2 * 7 + 1
        adapted = with_adapter(LoraConfig(r=4, **ALL))
        assert products(adapted) == 2 * 21 + 1 and products(adapted, LinearCopies()) == 2 * 4 + 1


class Odd(nn.Module):
    """Calls two layers on one input, then on others."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way = nn.Linear(4, 3), nn.Linear(4, 3), way

    def forward(self, input_ids, other=False, **_):
        x = input_ids.float().repeat(1, 4)
        if not other:
            return self.a(x) + self.b(x)
        if self.way == "in place":
            first = self.a(x)
            return first + self.b(x.add_(1))
        if self.way == "another":
            return self.a(x) + self.b(x.clone().add_(1)) + self.b(x)
        if self.way == "second first":
            return self.b(x + 2) + self.a(x)
        return self.a(x) + self.a(x + 1) + self.b(x) + self.b(x)


@pytest.mark.parametrize("way", ["in place", "another", "second first", "twice"])
def test_no_output_of_another_input_is_ever_used(way):
    torch.manual_seed(0)
    model, copies = Odd(way), LinearCopies()
    ids = torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        expected, bias = model(ids, other=True), model.a.bias + model.b.bias
        with copies.in_use(model):
            assert [len(product.layers) for product in copies._products] == [2]
            for _ in range(2):
                torch.testing.assert_close(model(ids, other=True), expected)
                x = 2 * ids.float().repeat(1, 4)
                torch.testing.assert_close(model(2 * ids), x @ (model.a.weight + model.b.weight).T + bias)
        assert copies._products[0]._input is None


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_compiled_step_has_no_break_and_is_kept_for_later_calls(lora):
    model, copies = with_adapter(LoraConfig(r=4, **ALL)) if lora else tiny.causal_lm(sharpness=1.0), LinearCopies()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda: model(input_ids=IDS, use_cache=False).logits, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with copies.in_use(model), torch.no_grad():
            torch.testing.assert_close(compiled(), logits(model), atol=2e-5, rtol=1e-5)
        if lora:
            shaken(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def completions(engine, params=PARAMS):
    groups = engine.generate(tiny.prompts((3, 9, 5)), 3, params, KEY)
    return [c for group in groups for c in group.completions]


def assert_same(found, expected):
    for mine, other in zip(found, expected, strict=True):
        assert (mine.token_ids, mine.finish_reason) == (other.token_ids, other.finish_reason)
        assert mine.logprobs == pytest.approx(other.logprobs, abs=2e-5)


@pytest.mark.parametrize("path", [None, DYNAMIC])
@pytest.mark.parametrize("kind", ["lora", "dora", "whole modules"])
def test_sampling_with_merged_adapters_gives_the_same_tokens(kind, path, caplog):
    model = with_adapter(MERGED[kind])
    merging = TransformersEngine(model, tiny.tokenizer(), batch_size=6, static_steps=True)
    merging._path, plain = path, TransformersEngine(model, tiny.tokenizer())
    with caplog.at_level(logging.WARNING, "online_dpo"):
        for _ in range(2):
            assert_same(completions(merging), completions(plain))
            shaken(model)
    assert not caplog.records
    assert merging._buffers.linears.nbytes > 0
    assert plain._buffers.linears.nbytes == 0, "on a CPU sampling is as it was"
    merging.release()
    assert merging._buffers.linears.nbytes == 0


def test_the_copies_hold_as_much_as_is_said_and_are_dropped_with_the_state_they_are_of():
    model, copies = tiny.causal_lm(sharpness=1.0), LinearCopies()
    linear = [m for m in model.modules() if type(m) is nn.Linear]
    with torch.autocast("cpu", torch.bfloat16):
        merged_logits(model, copies)
    assert copies.nbytes == sum(2 * m.weight.numel() for m in linear)
    merged_logits(model, copies)
    together = [m for m in linear if m.out_features != tiny.VOCABULARY and m not in _outputs(model)]
    assert copies.nbytes == sum(4 * m.weight.numel() for m in together), "in fp32 only what is put together"
    model.double()
    torch.testing.assert_close(merged_logits(model, copies), logits(model))
    assert {product.weight.dtype for product in copies._products} == {torch.float64}
    copies.release()
    assert copies.nbytes == 0 and not copies._forwards


def _outputs(model):
    return [m for name, m in model.named_modules() if name.endswith(("o_proj", "down_proj"))]


def test_where_memory_is_short_sampling_does_without_copies(caplog):
    model = with_adapter(LoraConfig(r=4, **ALL))
    engine = TransformersEngine(model, tiny.tokenizer(), batch_size=3, static_steps=True)
    engine._path = DYNAMIC
    expected = completions(TransformersEngine(model, tiny.tokenizer()))

    def no_room_beside_copies(module, args, kwargs):
        if kwargs.get("kv_cache") is not None and engine._buffers.linears.nbytes:
            raise torch.OutOfMemoryError("no room")

    model.base_model.model.model.register_forward_pre_hook(no_room_beside_copies, with_kwargs=True)
    with caplog.at_level(logging.WARNING):
        assert_same(completions(engine), expected)
        assert_same(completions(engine, replace(PARAMS)), expected)
    [record] = [r for r in caplog.records if r.name.startswith("online_dpo")]
    assert record.getMessage() == "Sampling ran out of memory; it goes on without copies of weights."
