"""Log-probabilities of rows, in every layout and along every path, against one sequence at a time."""

import inspect

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from online_dpo.modeling import logprobs
from online_dpo.modeling.attention.masks import (
    why_not_shared,
)
from online_dpo.modeling.introspection import accepts_argument
from online_dpo.modeling.loading import disable_dropout
from online_dpo.modeling.logprobs import can_chunk, enable_logprobs, row_logprobs
from online_dpo.modeling.reference import frozen_copy
from online_dpo.packing.pack import pack_groups, pack_pairs, stand_in
from online_dpo.types import Pair
from support import tiny
from support.single_sequences import assert_equals_oracle, gradients, groups, oracle, ready, weighted

LAYOUTS = [(False, 0), (True, 0), (True, 200)]


def make_pairs():
    return [Pair(g, i % 2, 1 - i % 2, chosen_score=2.0 + i, rejected_score=0.5) for i, g in enumerate(groups())]


@torch.no_grad()
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("shared,capacity", LAYOUTS)
@pytest.mark.parametrize("family,attention", [(f, a) for f in tiny.FAMILIES for a in tiny.attentions(f)])
def test_every_layout_equals_single_sequences(family, attention, shared, capacity, chunked, monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", 5 * tiny.VOCABULARY)
    model = ready(tiny.causal_lm(family, attn_implementation=attention))
    assert model.config._attn_implementation == attention and why_not_shared(model) is None
    made = groups()
    assert_equals_oracle(model, pack_groups(made, [], shared, capacity), made, chunked)


def other(cls, config, **fields):
    torch.manual_seed(0)
    small = dict(vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, pad_token_id=0, eos_token_id=1)
    model = cls(config(**small, **fields)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.dim() == 2 else 1.0)
    return model


ATTENTION = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
HEADS = {
    "scale of the logits": lambda: other(CohereForCausalLM, CohereConfig, logit_scale=0.3, **ATTENTION),
    "division of the logits": lambda: other(GraniteForCausalLM, GraniteConfig, logits_scaling=0.2, **ATTENTION),
    "bias on the head": lambda: other(PhiForCausalLM, PhiConfig, tie_word_embeddings=False, **ATTENTION),
    "soft cap": lambda: tiny.causal_lm("gemma2", final_logit_softcapping=0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_heads_do_all_that_they_do(head):
    model = ready(HEADS[head]())
    if head == "bias on the head":
        model.lm_head.bias.normal_()
    made = groups()
    assert_equals_oracle(model, pack_groups(made, [], True), made, chunked=True)
    if model.lm_head.bias is None:  # what would be forgotten makes a difference
        hidden = model.model(torch.tensor([made[0].prompt.token_ids])).last_hidden_state
        assert (model.lm_head(hidden) - model(torch.tensor([made[0].prompt.token_ids])).logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("chunked", [True, False])
def test_models_without_positions_are_right_in_padded_rows(chunked):
    made = groups()
    for model, reason in (
        (other(MambaForCausalLM, MambaConfig, state_size=4), "position_ids"),
        (other(BloomForCausalLM, BloomConfig, n_head=4), "position_ids"),
    ):
        assert reason in why_not_shared(model) and can_chunk(model)
        assert_equals_oracle(ready(model), pack_groups(made, [], False), made, chunked)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shared,capacity", LAYOUTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_equal_single_sequences(family, shared, capacity, checkpointing, monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", 5 * tiny.VOCABULARY)
    model, made = ready(tiny.causal_lm(family)), groups()
    expected = gradients(model, weighted(oracle(model, made)[0]))
    if checkpointing:
        tiny.checkpoint_layers(model.train())
        disable_dropout(model)
    rows = pack_groups(made, [], shared, capacity)
    for chunked in (True, False):
        got = gradients(model, weighted(row_logprobs(model, rows, chunked=chunked).token_logps_M))
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert (got[name] - value).norm() <= 1e-4 * value.norm() + 1e-6, (name, chunked)


def test_chunks_that_are_computed_again_drop_the_same(monkeypatch):
    """An adapter on the head has dropout: without recomputation the gradient is that of what was drawn."""
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", 5 * tiny.VOCABULARY)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = ready(get_peft_model(tiny.causal_lm(tie_word_embeddings=False), adapter)).train()
    rows, found = pack_groups(groups(), [], True), []
    for recomputed in (True, False):
        if not recomputed:
            monkeypatch.setattr(logprobs, "checkpoint", lambda run, *given, **_: run(*given))
        torch.manual_seed(1)
        found.append(gradients(model, weighted(row_logprobs(model, rows).token_logps_M)))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, atol=1e-6, rtol=1e-5)
        assert value.norm() > 0


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_adapters_and_adapter_off_on_the_head_as_well(modules):
    model = get_peft_model(tiny.causal_lm(tie_word_embeddings=False), LoraConfig(r=4, target_modules=modules))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    made = groups()
    rows = pack_groups(made, [], True)
    expected = gradients(model, weighted(oracle(model, made)[0]))
    ready(model)
    got = gradients(model, weighted(row_logprobs(model, rows).token_logps_M))
    assert got.keys() == expected.keys() and all("lora" in name for name in got)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        assert_equals_oracle(model, rows, made, chunked=True)
        off = row_logprobs(model, rows).logps_S
    assert (off - row_logprobs(model, rows).logps_S).abs().max() > 0.1


@pytest.mark.smoke
def test_a_copy_predicts_with_its_own_weights():
    model = ready(tiny.causal_lm())
    copy = frozen_copy(model)
    rows = pack_pairs(make_pairs(), True)
    before = row_logprobs(copy, rows).logps_S
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    assert torch.equal(row_logprobs(copy, rows).logps_S, before)
    assert not torch.allclose(row_logprobs(model, rows).logps_S, before)


def test_a_model_that_was_enabled_still_gives_logits_and_generates():
    model, ids = tiny.causal_lm(), torch.tensor([[5, 6, 7]])
    before = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    enable_logprobs(model)
    enable_logprobs(model)
    assert torch.equal(model(ids).logits, before[0])
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), before[1])
    assert accepts_argument(model, "logits_to_keep")


@torch.no_grad()
def test_which_heads_are_nothing_but_a_matrix_product():
    rows = pack_pairs(make_pairs(), True)

    def is_linear(model):
        row_logprobs(ready(model), rows)
        return logprobs._linear_heads[model]

    assert {name: is_linear(tiny.causal_lm(name)) for name in tiny.FAMILIES} == {
        name: name != "gemma2" for name in tiny.FAMILIES
    }
    assert {name: is_linear(make()) for name, make in HEADS.items()} == {
        "scale of the logits": False,
        "division of the logits": False,
        "bias on the head": True,
        "soft cap": False,
    }


def test_models_with_hooks_of_accelerate_and_signatures_of_their_own():
    hooked = tiny.causal_lm()
    add_hook_to_module(hooked, AlignDevicesHook(execution_device="cpu"))
    mamba = ready(other(MambaForCausalLM, MambaConfig, state_size=4))
    rows = pack_pairs(make_pairs(), True)
    expected = row_logprobs(ready(tiny.causal_lm()), rows).logps_S
    assert torch.equal(row_logprobs(ready(hooked), rows).logps_S, expected)
    assert torch.equal(row_logprobs(frozen_copy(hooked), rows).logps_S, expected)
    plain = ready(tiny.causal_lm())
    assert "position_ids" in inspect.signature(plain.forward).parameters
    assert "position_ids" not in inspect.signature(mamba.forward).parameters


def test_what_is_no_model_of_transformers_is_left_as_it_is():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny.causal_lm()

        def forward(self, input_ids, attention_mask=None, use_cache=None):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    model = ready(Wrapper())
    assert not can_chunk(model) and "not a model of transformers" in why_not_shared(model)
    made = groups()
    assert_equals_oracle(model.inner, pack_groups(made, [], False), made, chunked=False)


@torch.no_grad()
@pytest.mark.parametrize("shared,capacity", LAYOUTS)
def test_bf16_errs_no_more_than_padded_rows_do(shared, capacity):
    made = groups()
    model = tiny.causal_lm(hidden_size=64)
    exact, _ = oracle(model, made)
    ready(model.to(torch.bfloat16))
    padded = row_logprobs(model, pack_groups(made, [], False), chunked=False).token_logps_M
    got = row_logprobs(model, pack_groups(made, [], shared, capacity))
    assert got.token_logps_M.dtype == torch.float32 and got.entropy_M.dtype == torch.float32
    assert (got.token_logps_M - exact).abs().mean() <= 1.5 * (padded - exact).abs().mean()


@pytest.mark.parametrize("shared", [False, True])
def test_stand_in_weighs_nothing_and_is_finite(shared):
    rows = stand_in(shared)
    assert rows.weight_N.tolist() == [0.0] and rows.pairs == ()
    assert row_logprobs(ready(tiny.causal_lm()), rows).logps_S.isfinite().all()


def test_wrappers_do_not_hide_what_a_model_takes():
    model = tiny.causal_lm("gpt2")
    assert accepts_argument(torch.compile(model), "position_ids") and accepts_argument(model, "logits_to_keep")
    assert not accepts_argument(model, "no_such_argument")


def test_dropout_is_switched_off_in_modules_and_in_numbers():
    model = tiny.causal_lm("gpt_neox", attention_dropout=0.5, hidden_dropout=0.5).train()
    ids = torch.arange(4, 24)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits) and model.config.hidden_dropout == 0.5
