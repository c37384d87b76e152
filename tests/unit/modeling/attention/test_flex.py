"""FlexAttention: values and gradients against plain attention and single sequences, and how often it is compiled.

A CPU has no fused backward pass, and PyTorch refuses gradients there. Its dense one, which runs here, computes what the
kernels of a GPU are to compute, from the same block masks and mask functions.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from online_dpo.modeling.attention import flex, kernel_check
from online_dpo.modeling.attention.choice import choose_attention, use_flex_attention, why_not_flex
from online_dpo.modeling.attention.masks import attention_inputs, visible_mask
from online_dpo.modeling.attention.rows import fitted_rows, padded
from online_dpo.modeling.borrowing import eval_mode
from online_dpo.modeling.forward_path import PathChoice, choose_path
from online_dpo.modeling.logprobs import row_logprobs
from online_dpo.packing.pack import pack_groups, stand_in
from online_dpo.packing.prefix_tree import PADDING
from support import tiny
from support.mixed_windows import mixed_model, random_groups
from support.single_sequences import gradients, groups, oracle, ready, weighted

CPU = torch.device("cpu")


class Backend:
    """Runs what Dynamo traced as it is, and counts how often it traced."""

    def __init__(self):
        self.compilations = 0

    def __call__(self, module, inputs):
        self.compilations += 1
        return module.forward


@pytest.fixture
def compiled(monkeypatch):
    """FlexAttention compiled on a CPU as on a GPU, with gradients; yields what counts compilations."""
    torch._dynamo.reset()
    backend = Backend()
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *inputs: None)
    monkeypatch.setattr(flex, "COMPILED_ON", {"cpu"})
    monkeypatch.setattr(flex, "BACKEND", backend)
    monkeypatch.setattr(flex, "_right", set())
    yield backend
    torch._dynamo.reset()


def flex_model(model):
    use_flex_attention(ready(model))
    return model


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (5, None), (None, 7), (300, None)])
def test_block_masks_hide_what_the_dense_mask_hides(window, chunk, monkeypatch):
    monkeypatch.setattr(flex, "CHUNK", 2 * 128 * 640)  # so that a mask is made in several pieces
    rows = pack_groups(random_groups((300, 20, 100, 7)), [], True, 600).tokens
    tokens = padded(rows, 640)
    mask = flex.block_mask(tokens, window, chunk)
    real = tokens.tree_RT != PADDING
    dense = create_mask(mask.mask_mod, len(real), 1, 640, 640, "cpu")[:, 0]
    pairs = real[:, :, None] & real[:, None, :]
    assert torch.equal(dense & pairs, visible_mask(tokens, window, chunk) & pairs)
    itself = torch.eye(640, dtype=torch.bool)
    assert torch.equal(dense & ~pairs, itself & ~pairs)  # padding attends to itself only, and nothing to padding
    theirs = create_block_mask(mask.mask_mod, len(real), None, 640, 640, "cpu")
    for ours, right in zip(mask.as_tuple(), theirs.as_tuple(), strict=True):
        assert not isinstance(ours, torch.Tensor) or torch.equal(ours, right)
    assert mask.sparsity() > 50


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in ("gpt2", "gemma2")])
def test_flex_attention_equals_single_sequences(family):
    model, made = ready(tiny.causal_lm(family)), groups()
    expected, _ = oracle(model, made)
    use_flex_attention(model)
    rows = pack_groups(made, [], True, 200)
    kinds = attention_inputs(model, fitted_rows(model, rows).tokens)["attention_mask"]
    assert all(isinstance(mask, BlockMask) for mask in (kinds.values() if isinstance(kinds, dict) else [kinds]))
    torch.testing.assert_close(row_logprobs(model, rows).token_logps_M, expected, atol=1e-5, rtol=1e-5)
    padded_logps = row_logprobs(model, pack_groups(made, [], False)).token_logps_M  # everything else goes through SDPA
    torch.testing.assert_close(padded_logps, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("window", "chunk"), [(None, None), (40, None), (None, 50)])
def test_output_and_gradients_of_attention_equal_sdpa_with_the_dense_mask(compiled, dtype, window, chunk):
    tokens = kernel_check.sample_tokens(CPU, 512)
    call = kernel_check.Call(CPU, dtype, 4, 2, 16, 16, 0.3, window is not None)
    inputs = call.random_inputs(512)
    mask = flex.block_mask(tokens, window, chunk)
    got = kernel_check.gradients(flex.masked(*inputs, mask, 0.3), inputs)
    same = [x.detach().requires_grad_() for x in inputs]
    query, key, value = same
    output = F.scaled_dot_product_attention(
        query, key, value, visible_mask(tokens, window, chunk)[:, None], scale=0.3, enable_gqa=True
    )
    real = (tokens.tree_RT != PADDING)[:, None, :, None]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got[0] * real, output * real, atol=tolerance, rtol=tolerance)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * real
    found = torch.autograd.grad(flex.masked(*inputs, mask, 0.3), inputs, weights)
    right = torch.autograd.grad(output, same, weights)
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
        assert ours.isfinite().all()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "mixed"])
def test_gradients_of_a_model_equal_single_sequences(compiled, family, checkpointing):
    plain = mixed_model() if family == "mixed" else tiny.causal_lm(family)
    model, made = flex_model(copy.deepcopy(plain)), groups()
    if checkpointing:
        model.train()
        tiny.checkpoint_layers(model)
    got = row_logprobs(model, pack_groups(made, [], True, 200)).token_logps_M
    expected, _ = oracle(plain, made)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    ours, right = gradients(model, weighted(got)), gradients(plain, weighted(expected))
    for name, gradient in ours.items():
        assert (gradient - right[name]).norm() <= 1e-4 * right[name].norm(), name


def test_padding_rows_poison_no_gradient(compiled):
    model = flex_model(mixed_model())
    got = row_logprobs(model, stand_in(True))  # 4 tokens in a row of 256
    assert all(gradient.isfinite().all() for gradient in gradients(model, got.logps_S.sum()).values())


def test_models_with_mixed_windows_are_compiled_a_few_times_for_all_lengths(compiled):
    policy, reference = flex_model(mixed_model()), flex_model(mixed_model(1))
    reward = flex_model(tiny.causal_lm("llama", max_position_embeddings=2048))
    counts = []
    for lengths in ((9, 2, 14), (40, 90, 200), (120,), (400, 20)):
        for capacity in (0, 257):  # one row or several, of 1 to 6 blocks
            rows = pack_groups(random_groups(lengths), [], True, capacity)
            row_logprobs(policy, rows).logps_S.sum().backward()
            with torch.no_grad():
                for model in (reference, policy, reward):
                    row_logprobs(model, rows)
            counts.append(compiled.compilations)
    # Full and sliding attention with gradients and without, and the reward model: with gradients only in its check.
    assert counts[0] == counts[-1] == 6, counts


def test_another_thread_and_other_functions_keep_their_own_limit(compiled, monkeypatch):
    before = torch._dynamo.config.recompile_limit
    row_logprobs(flex_model(mixed_model()), pack_groups(groups(), [], True, 200))
    assert torch._dynamo.config.recompile_limit == before != flex.COMPILATIONS


def test_passing_the_limit_is_an_error_and_no_unfused_run(compiled, monkeypatch):
    monkeypatch.setattr(flex, "COMPILATIONS", 1)
    rows = pack_groups(groups(), [], True, 200)
    with pytest.raises(FailOnRecompileLimitHit), torch.no_grad():
        for heads in (4, 2):
            row_logprobs(flex_model(tiny.causal_lm("llama", num_attention_heads=heads, num_key_value_heads=2)), rows)


def test_passing_the_limit_at_the_start_leads_to_sdpa_and_is_told(compiled, monkeypatch):
    monkeypatch.setattr(flex, "COMPILATIONS", 1)
    model = flex_model(mixed_model())
    path, [reason] = choose_path({"the policy": lambda: eval_mode(model)}, random_groups((30, 20)), True)
    assert path.shared and reason.startswith("the policy is read through SDPA, not FlexAttention: it fails with Fail")
    assert model.config._attn_implementation == "online_dpo_sdpa"


@pytest.mark.parametrize("spoilt", ["forward", "backward"])
def test_a_wrong_kernel_is_found_at_the_start(compiled, monkeypatch, spoilt):
    def compute(query, key, value, mask, scale, shares_heads):
        output = flex.flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=shares_heads)
        wrong = output * 1.1
        return wrong if spoilt == "forward" else output.detach() + wrong - wrong.detach()

    monkeypatch.setattr(flex, "_compute", compute)
    model = flex_model(tiny.causal_lm("llama"))
    path, [reason] = choose_path({"the policy": lambda: eval_mode(model)}, random_groups((30, 20)), True)
    assert path.shared and "FlexAttention's kernel is wrong by 9" in reason or "by 1" in reason


def test_a_run_that_demands_flex_attention_ends_where_it_is_wrong(compiled, monkeypatch):
    monkeypatch.setattr(kernel_check, "TOLERANCE", -1.0)
    for needed in (False, True):
        model = flex_model(tiny.causal_lm("llama"))
        choice = PathChoice(CPU, share=True, needs_flex=needed)
        if needed:
            with pytest.raises(ValueError, match="cannot be used: the policy is read through SDPA"):
                choice.settle({"the policy": lambda m=model: eval_mode(m)}, random_groups((30, 20)))
        else:
            choice.settle({"the policy": lambda m=model: eval_mode(m)}, random_groups((30, 20)))
            assert choice.path.shared and not choice.path.flex


def test_rows_are_filled_where_all_models_use_flex_attention(compiled):
    chosen = []
    for reference in (flex_model(tiny.causal_lm("llama")), ready(tiny.causal_lm("gemma2"))):
        models = {"the policy": flex_model(tiny.causal_lm("llama")), "the reference": reference}
        choice = PathChoice(CPU, share=True)
        choice.settle({name: lambda m=m: eval_mode(m) for name, m in models.items()}, random_groups((30, 20)))
        chosen.append((choice.path.shared, choice.path.flex))
    assert chosen == [(True, True), (True, False)]


@torch.no_grad()
def test_the_compiled_forward_pass_of_a_cpu_has_the_same_values(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(flex, "COMPILED_ON", {"cpu"})
    monkeypatch.setattr(flex, "_check", lambda call: None)  # it needs gradients
    model, made = flex_model(tiny.causal_lm("llama", head_dim=16)), random_groups((30, 70))
    expected, _ = oracle(model, made)
    got = row_logprobs(model, pack_groups(made, [], True, 300)).token_logps_M
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_under_autocast_all_that_attention_reads_is_cast(monkeypatch):
    """Rotary embeddings promote queries and keys to fp32, and FlexAttention refuses them beside values in bf16."""
    model, made = flex_model(tiny.causal_lm("llama")), groups()
    seen = []
    masked = flex.masked
    monkeypatch.setattr(flex, "masked", lambda *given: seen.append([x.dtype for x in given[:3]]) or masked(*given))
    with torch.autocast("cpu", torch.bfloat16):
        got = row_logprobs(model, pack_groups(made, [], True, 200)).token_logps_M
    assert seen == [[torch.bfloat16] * 3] * 2
    torch.testing.assert_close(got, oracle(model, made)[0], atol=0.1, rtol=0.05)


def test_flex_attention_is_not_saved_with_the_model_and_generation_stays_the_same(tmp_path):
    model, ids = tiny.causal_lm(), torch.tensor([[5, 6, 7]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    use_flex_attention(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)
    model.save_pretrained(tmp_path)
    assert "flex" not in (tmp_path / "config.json").read_text()


def dropping():
    model = tiny.causal_lm("llama", attention_dropout=0.1)
    assert why_not_flex(model, trains=False) is None
    return model


CANNOT = {
    "soft cap": lambda: tiny.causal_lm("gemma2"),
    "attn_implementation='eager'": lambda: tiny.causal_lm(attn_implementation="eager"),
    "dropout": dropping,
}


@pytest.mark.parametrize("why", CANNOT)
def test_where_flex_attention_cannot_be_used_it_is_told_or_an_error(why, caplog):
    model, cuda = CANNOT[why](), torch.device("cuda")
    with pytest.raises(ValueError, match="`flex_attention=True` cannot be used with the policy"):
        choose_attention(model, "the policy", cuda, True, flex_attention=True, trains=True)
    choose_attention(model, "the policy", cuda, True, trains=True)
    [told] = caplog.messages
    assert told.startswith("FlexAttention is not used for the policy: ") and why in told
    assert model.config._attn_implementation == ("online_dpo_sdpa" if why == "dropout" else "eager")


def test_what_is_chosen_by_device(caplog):
    chosen = []
    for device, share, wanted in (
        ("cpu", True, None),
        ("cuda", True, None),
        ("cuda", True, False),
        ("cuda", False, None),
    ):
        model = tiny.causal_lm("llama")
        choose_attention(model, "the policy", torch.device(device), share, wanted)
        chosen.append(model.config._attn_implementation)
    assert chosen == ["online_dpo_segments", "online_dpo_flex", "online_dpo_sdpa", "online_dpo_sdpa"]
    assert not caplog.messages
    choose_attention(model, "the policy", torch.device("cuda"), True, unfit="`torch_compile` compiles the whole model")
    assert "`torch_compile` compiles" in caplog.messages[0]


def test_the_reach_of_windows_is_data():
    tokens = padded(pack_groups(groups(), [], True, 200).tokens, 256)
    masks = [flex.block_mask(tokens, window, chunk) for window, chunk in ((4, None), (9, None), (None, 6))]
    assert len({mask.mask_mod.__code__ for mask in masks}) == 1
    assert math.isfinite(masks[0].sparsity())
