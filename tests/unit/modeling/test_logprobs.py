"""Log-probabilities of rows, in every layout and along every path, against one sequence at a time."""

import inspect
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.modeling import logprobs
from online_dpo.modeling.attention import segments
from online_dpo.modeling.attention.masks import (
    attention_inputs,
    use_flex_attention,
    use_segments,
    visible_mask,
    why_not_shared,
)
from online_dpo.modeling.introspection import accepts_argument
from online_dpo.modeling.loading import disable_dropout
from online_dpo.modeling.logprobs import can_chunk, enable_logprobs, row_logprobs
from online_dpo.modeling.reference import frozen_copy
from online_dpo.packing.pack import pack_groups, pack_pairs, stand_in
from online_dpo.types import Pair
from support import tiny

COMPLETIONS = [[[5, 6, 7, 1], [8, 9], [8, 9, 30]], [[10, 11, 12, 13, 14, 1], [15, 1], [16]], [[1], [20, 21, 22], [23]]]
LENGTHS = (9, 2, 14)
LAYOUTS = [(False, 0), (True, 0), (True, 200)]


def groups():
    return [tiny.group(p, c) for p, c in zip(tiny.prompts(LENGTHS), COMPLETIONS, strict=True)]


def make_pairs():
    return [Pair(g, i % 2, 1 - i % 2, chosen_score=2.0 + i, rejected_score=0.5) for i, g in enumerate(groups())]


def ready(model):
    enable_logprobs(model)
    return model


def alone(model, prompt, completion):
    """The oracle: one sequence, no padding, no mask, no positions, whole log-softmax in double."""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, torch.tensor(completion)[:, None])[:, 0], entropy


def oracle(model, made):
    both = [alone(model, g.prompt.token_ids, c.token_ids) for g in made for c in g.completions]
    return torch.cat([logps for logps, _ in both]).float(), torch.cat([entropy for _, entropy in both]).float()


def assert_equals_oracle(model, rows, made, chunked):
    got = row_logprobs(model, rows, chunked=chunked)
    logps, entropy = oracle(model, made)
    torch.testing.assert_close(got.token_logps_M, logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.entropy_M, entropy, atol=1e-5, rtol=1e-5)
    sums = torch.stack([part.sum() for part in logps.split(rows.length_S.tolist())])
    torch.testing.assert_close(got.logps_S, sums, atol=1e-4, rtol=1e-5)


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


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weighted(token_logps_M):
    """A different factor for each token, so that no error cancels."""
    return (token_logps_M * torch.linspace(-1.0, 2.0, len(token_logps_M))).sum()


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


def test_windows_over_indices_in_the_row_are_refused():
    config = GPTNeoConfig(
        vocab_size=44, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    assert "indices in the row" in why_not_shared(GPTNeoForCausalLM(config))


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


@torch.no_grad()
def test_what_the_other_completions_say_changes_nothing():
    model, made = ready(tiny.causal_lm("gpt2")), groups()
    rows = pack_groups(made, [], True, 200)
    before = row_logprobs(model, rows).token_logps_M
    mine = (rows.tokens.tree_RT == 0) & (rows.tokens.branch_RT <= 1)
    changed = torch.where(mine, rows.tokens.ids_RT, 40)
    after = row_logprobs(model, replace(rows, tokens=replace(rows.tokens, ids_RT=changed))).token_logps_M
    assert torch.equal(after[:4], before[:4]) and not torch.allclose(after[4:], before[4:])


def test_visible_by_hand():
    rows = pack_groups([tiny.group(tiny.prompts([2])[0], [[5, 6], [7]])], [], True).tokens
    assert visible_mask(rows)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert visible_mask(rows, window=2)[0].int().tolist()[3:] == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    assert visible_mask(rows, chunk=2)[0].int().tolist()[2:] == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


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


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in ("gpt2", "gemma2")])
def test_flex_attention_equals_single_sequences(family):
    model, made = ready(tiny.causal_lm(family)), groups()
    expected, _ = oracle(model, made)
    use_flex_attention(model)
    rows = pack_groups(made, [], True, 200)
    kinds = attention_inputs(model, rows.tokens)["attention_mask"]
    assert all(isinstance(mask, BlockMask) for mask in (kinds.values() if isinstance(kinds, dict) else [kinds]))
    torch.testing.assert_close(row_logprobs(model, rows).token_logps_M, expected, atol=1e-5, rtol=1e-5)
    padded = row_logprobs(model, pack_groups(made, [], False)).token_logps_M  # everything else goes through SDPA
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("capacity", [0, 200])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_in_segments_equal_single_sequences(family, capacity, checkpointing, monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST", 1)
    calls = []
    segment = segments._row
    monkeypatch.setattr(segments, "_row", lambda *given: calls.append(given[3]) or segment(*given))
    model, plain, made = ready(tiny.causal_lm(family)), tiny.causal_lm(family), groups()
    use_segments(model)
    if checkpointing:
        disable_dropout(model)
        model.train()
        tiny.checkpoint_layers(model)
    got = row_logprobs(model, pack_groups(made, [], True, capacity)).token_logps_M
    expected, _ = oracle(plain, made)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weight_M = torch.linspace(-1, 1, len(expected))
    (got * weight_M).sum().backward()
    (expected * weight_M).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm(), name
    windows = family in ("gemma2", "mistral")  # they are read with a mask
    assert bool(calls) != windows
    if capacity and calls:
        assert max(map(len, calls)) > 4  # several trees in a row


@torch.no_grad()
def test_segments_begin_with_long_rows():
    for length, expected in ((300, 0), (400, 2)):
        model, group = (
            tiny.causal_lm(max_position_embeddings=512),
            tiny.group(tiny.prompts((length,))[0], [[5, 6], [7]]),
        )
        use_segments(ready(model))
        rows = pack_groups([group], [], True)
        found = attention_inputs(model, rows.tokens)["segments"]
        assert (found is None) == (expected == 0)
        if found is not None:
            assert found == [[(0, 0, 0, 400, 0), (0, 400, 400, 402, 400), (0, 400, 402, 403, 402)]]
        torch.testing.assert_close(row_logprobs(model, rows).token_logps_M, oracle(model, [group])[0])


def test_flex_attention_is_not_saved_with_the_model_and_generation_stays_the_same(tmp_path):
    model, ids = tiny.causal_lm(), torch.tensor([[5, 6, 7]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    use_flex_attention(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)
    model.save_pretrained(tmp_path)
    assert "flex" not in (tmp_path / "config.json").read_text()


def test_flex_attention_wants_sdpa_and_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="soft cap"):
        use_flex_attention(tiny.causal_lm("gemma2"))
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        use_flex_attention(tiny.causal_lm(attn_implementation="eager"))
    with pytest.raises(ValueError, match="needs a GPU"):
        OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, flex_attention=True)
