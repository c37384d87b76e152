"""Our decoder against plain forward passes over single sequences, and what it refuses."""

import logging

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GptOssConfig, GptOssForCausalLM, MambaConfig, MambaForCausalLM

from online_dpo.modeling.borrowing import eval_mode
from online_dpo.rollout.builtin import decoding, kv_cache
from online_dpo.rollout.builtin.decoding import Decoder, can_decode
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams
from support import tiny

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [20, 21, 22, 23], [30, 31, 5]]
PARAMS = SamplingParams(max_new_tokens=10, end_token_ids=(tiny.EOS,))
KEY = RolloutKey(0, 0)


def gpt_oss():
    """Attention with sinks, sliding windows in every other layer, and experts."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=4,
        attn_implementation="eager",
    )
    return GptOssForCausalLM(config).eval()


MODELS = {name: lambda name=name: tiny.causal_lm(name) for name in tiny.FAMILIES} | {"gpt_oss": gpt_oss}


def alone(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("name", MODELS)
def test_every_step_equals_a_plain_forward_pass(name, monkeypatch):
    """Prompts in several pieces, memory that grows, and sequences that leave on the way."""
    monkeypatch.setitem(decoding.PREFILL_TOKENS, "cpu", 8)
    monkeypatch.setattr(kv_cache, "FIRST_SLOTS", 2)
    model, k = MODELS[name](), 3
    with torch.no_grad():
        decoder = Decoder(model, PROMPTS, k, max_new_tokens=12)
        logits_GV = decoder.prefill()
        for g, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(logits_GV[g], alone(model, prompt), atol=2e-5, rtol=1e-5)
        sequences = [list(prompt) for prompt in PROMPTS for _ in range(k)]
        for step in range(10):
            if step == 4:  # groups 0 and 2 go on, the latter's third completion as its first
                keep = torch.tensor([[0, 2], [8, 7]])
                decoder.keep_only(keep)
                sequences = [list(sequences[row]) for row in keep.flatten()]
            tokens = [(7 * step + 3 * row) % 30 + 4 for row in range(len(sequences))]
            logits_BV = decoder.step(torch.tensor(tokens))
            for row, token in enumerate(tokens):
                sequences[row].append(token)
                torch.testing.assert_close(logits_BV[row], alone(model, sequences[row]), atol=2e-5, rtol=1e-5)


def test_where_all_is_seen_there_is_no_mask(monkeypatch):
    """With prompts of one length nothing that is read has to be hidden; memory that grows is read as far as written."""
    monkeypatch.setattr(kv_cache, "FIRST_SLOTS", 2)
    model, masks = tiny.causal_lm(), []
    keep = model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        decoder = Decoder(model, [[5, 6, 7], [8, 9, 10]], 1, max_new_tokens=6)
        decoder.prefill()
        steps = [decoder.step(torch.tensor([11 + step, 20 + step])) for step in range(5)]
        keep.remove()
        for step, logits_BV in enumerate(steps):
            ids = [8, 9, 10, *range(20, 21 + step)]
            torch.testing.assert_close(logits_BV[1], alone(model, ids), atol=2e-5, rtol=1e-5)
    assert masks == [None] * 6


def test_sequences_may_leave_before_the_first_step():
    model = tiny.causal_lm()
    with torch.no_grad():
        decoder = Decoder(model, PROMPTS, 2, max_new_tokens=4)
        decoder.prefill()
        decoder.keep_only(torch.tensor([[3], [4]]))
        logits_BV = decoder.step(torch.tensor([9, 10]))
    torch.testing.assert_close(logits_BV[0], alone(model, [12, 9]), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits_BV[1], alone(model, [20, 21, 22, 23, 10]), atol=2e-5, rtol=1e-5)


def test_the_model_has_its_own_attention_again_afterwards():
    model = tiny.causal_lm()
    before = model.config.to_dict()
    with pytest.raises(IndexError), torch.no_grad():
        Decoder(model, [[10**6]], 1, 1).prefill()
    assert model.config._attn_implementation == "sdpa" and model.config.to_dict() == before


def test_what_can_be_decoded():
    torch.manual_seed(0)
    assert all(can_decode(make()) for make in MODELS.values())
    bloom = BloomForCausalLM(BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, n_layer=1, n_head=2))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=1))
    assert not can_decode(bloom) and not can_decode(mamba)


def sample(model, caplog):
    with caplog.at_level(logging.WARNING):
        groups = TransformersEngine(model, tiny.tokenizer()).generate(tiny.prompts((3, 7)), 2, PARAMS, KEY)
    return [c for g in groups for c in g.completions], [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_found_right(name, dtype, caplog):
    assert sample(MODELS[name]().to(dtype), caplog)[1] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_attention_goes_other_ways_is_sampled_with_generate(dtype, caplog):
    expected, _ = sample(tiny.causal_lm(sharpness=3.0).to(dtype), caplog)
    model = tiny.causal_lm(sharpness=3.0).to(dtype)
    own = type(model.model.layers[0].self_attn).forward
    for layer in model.model.layers:

        def forward(*args, module=layer.self_attn, kv_cache=None, **kwargs):
            kwargs |= {} if kv_cache is None else {"attention_mask": None}
            module.config._attn_implementation, ours = "sdpa", module.config._attn_implementation
            try:
                return own(module, *args, **kwargs)
            finally:
                module.config._attn_implementation = ours

        layer.self_attn.forward = forward
    completions, [said] = sample(model, caplog)
    assert said.startswith("Sampling takes a slower path") and "log-probabilities differ by" in said
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]


def test_a_model_that_fails_in_our_decoder_is_sampled_with_generate(caplog):
    model = tiny.causal_lm()

    def refuse(module, args, kwargs):
        if "kv_cache" in kwargs:
            raise TypeError("no such argument")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    completions, [said] = sample(model, caplog)
    assert "it fails with TypeError: no such argument" in said
    expected, _ = sample(tiny.causal_lm(), caplog)
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]


def test_an_adapter_takes_part():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        tiny.causal_lm("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    with torch.no_grad(), eval_mode(model):
        decoder = Decoder(model, PROMPTS, 2, 3)
        decoder.prefill()
        logits_BV = decoder.step(torch.tensor([9] * 8))
        torch.testing.assert_close(logits_BV[2], alone(model, [12, 9]), atol=2e-5, rtol=1e-5)
        with model.disable_adapter():
            assert (logits_BV[2] - alone(model, [12, 9])).abs().max() > 1e-3
