"""SDPA as on a GPU: which kernel is called, with what, and that its values are those of PyTorch's SDPA.

A CPU has no memory-efficient kernel. So that values can be tested, plain attention stands in for it there.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from online_dpo.modeling.attention import rows as fitted
from online_dpo.modeling.attention import sdpa
from online_dpo.modeling.attention.choice import choose_attention, use_sdpa
from online_dpo.modeling.logprobs import row_logprobs
from online_dpo.packing.pack import pack_groups
from support import tiny
from support.mixed_windows import mixed_model, random_groups
from support.single_sequences import gradients, groups, oracle, ready, weighted


class Kernel:
    """Plain attention in place of the memory-efficient kernel; ``calls`` are the biases and types it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, query, key, value, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        assert query.dtype == key.dtype == value.dtype and (bias is None or bias.dtype == query.dtype)
        assert query.shape[1] == key.shape[1] == value.shape[1]  # it knows no heads that share keys
        assert bias is None or bias.stride(2) * bias.element_size() % sdpa.ALIGNMENT == 0
        self.calls.append((bias, query.dtype, is_causal, compute_log_sumexp))
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout_p, is_causal=is_causal, scale=scale
        )
        nothing = torch.empty(0)
        return output, nothing, nothing, nothing


@pytest.fixture
def kernel(monkeypatch):
    stand_in = Kernel()
    library = torch.library.Library("aten", "IMPL")
    for key in ("CPU", "AutogradCPU"):
        library.impl("_scaled_dot_product_efficient_attention", stand_in, key)
    monkeypatch.setattr(sdpa, "KERNEL_ON", {"cpu"})
    monkeypatch.setattr(fitted, "ROUNDED_ON", {"cpu"})
    yield stand_in
    library._destroy()


FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "mistral", "mixed")


def made(family):
    return ready(mixed_model() if family == "mixed" else tiny.causal_lm(family))


def sdpa_model(family):
    model = made(family)
    use_sdpa(model)
    return model


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_equal_single_sequences(kernel, family, shared):
    model, plain, given = sdpa_model(family), made(family), groups()
    got = row_logprobs(model, pack_groups(given, [], shared)).token_logps_M
    expected, _ = oracle(plain, given)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    ours, right = gradients(model, weighted(got)), gradients(plain, weighted(expected))
    for name, gradient in ours.items():
        assert (gradient - right[name]).norm() <= 1e-4 * right[name].norm(), name
    assert kernel.calls and all(bias is not None and bias.shape[-1] == 64 for bias, *_ in kernel.calls)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixed"])
def test_the_mask_is_converted_once_a_pass_and_saved_once(kernel, monkeypatch, family, checkpointing):
    model = sdpa_model(family) if family == "llama" else ready(mixed_model(num_hidden_layers=4, layer_types=KINDS))
    use_sdpa(model)
    if checkpointing:
        model.train()
        tiny.checkpoint_layers(model)
    saved = {}

    def keep(tensor):
        if tensor.dim() >= 3 and tensor.shape[-2:] == (64, 64):
            saved[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    rows = pack_groups(random_groups((9, 12), longest=10), [], True)
    assert rows.tokens.ids_RT.shape[1] <= 64
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        row_logprobs(model, rows).logps_S.sum().backward()
    kinds = 1 if family == "llama" else 2
    storages = {bias.untyped_storage().data_ptr() for bias, *_ in kernel.calls}
    assert len(kernel.calls) == (2 if family == "llama" else 4) * (2 if checkpointing else 1)
    assert len(storages) == kinds
    masks = {storage for storage in saved if storage in storages}
    assert len(masks) <= kinds


KINDS = ["sliding_attention", "full_attention"] * 2


@torch.no_grad()
def test_masks_are_in_the_type_of_autocast(kernel):
    model, given = sdpa_model("llama"), groups()
    with torch.autocast("cpu", torch.bfloat16):
        got = row_logprobs(model, pack_groups(given, [], True)).token_logps_M
    assert [(bias.dtype, dtype, trains) for bias, dtype, _, trains in kernel.calls] == [
        (torch.bfloat16, torch.bfloat16, False)
    ] * 2
    torch.testing.assert_close(got, oracle(model, given)[0], atol=0.1, rtol=0.05)


def test_a_query_without_any_key_gives_no_nan(kernel):
    """Padding behind a short window sees no key; what it computes becomes a key of the next layer."""
    module = nn.Module()
    query, key, value = (torch.randn(1, 2, 3, 16, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[[[True, False, False], [True, True, False], [False, False, False]]]])
    output = sdpa.attention(module, query, key, value, mask)[0]
    output.sum().backward()
    assert all(x.isfinite().all() for x in (output, query.grad, key.grad, value.grad))
    right = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(output[:, :2], right[:, :2])


@pytest.mark.parametrize("family", ["mistral", "mixed"])
def test_padded_rows_with_windows_shorter_than_the_padding_have_finite_gradients(kernel, family):
    model = sdpa_model(family)
    short, long = random_groups((2, 60), longest=4)
    logps = row_logprobs(model, pack_groups([short, long], [], False)).logps_S
    assert all(gradient.isfinite().all() for gradient in gradients(model, logps.sum()).values())


def test_without_a_mask_the_flash_kernel_is_left_to_pytorch_where_it_fits(kernel):
    module = nn.Module()
    module.num_key_value_groups = 2
    for dtype, expected in ((torch.bfloat16, []), (torch.float32, [(None, True)])):
        kernel.calls.clear()
        shapes = ((1, 4, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16))
        query, key, value = (torch.randn(shape).to(dtype) for shape in shapes)
        output = sdpa.attention(module, query, key, value, None)[0]
        assert [(bias, causal) for bias, _, causal, _ in kernel.calls] == expected
        right = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(output, right)


def test_heads_that_the_kernel_does_not_read_are_told_once(kernel, caplog):
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    for _ in range(2):
        query, key, value = (torch.randn(1, 2, 3, 6).bfloat16() for _ in range(3))
        sdpa.attention(nn.Module(), query, key, value, mask)
    assert not kernel.calls
    [told] = caplog.messages
    assert "heads of 6 and 6" in told and "may hold all attention scores" in told


@torch.no_grad()
def test_on_a_cpu_nothing_changes():
    seen = []
    given = groups()
    model = ready(tiny.causal_lm("llama"))
    choose_attention(model, "the policy", torch.device("cpu"), share=True)

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "attention" in str(func):
                seen.append((str(func), args[0].shape[2]))
            return func(*args, **(kwargs or {}))

    rows = pack_groups(given, [], True)
    with Record():
        row_logprobs(model, rows)
    length = rows.tokens.ids_RT.shape[1]
    assert seen == [("aten._scaled_dot_product_flash_attention_for_cpu.default", length)] * 2


@torch.no_grad()
def test_rows_are_rounded_without_a_change_of_what_is_read(kernel):
    for shared in (True, False):
        for family in ("llama", "gpt2"):
            model, rows = sdpa_model(family), pack_groups(groups(), [], shared)
            before = copy.deepcopy(rows.tokens)
            got = fitted.fitted_rows(model, rows)
            assert got.tokens.ids_RT.shape[1] == 64 and torch.equal(rows.tokens.ids_RT, before.ids_RT)
            for ours, right in ((got.source_M, rows.source_M), (got.read_X, rows.read_X)):
                assert torch.equal(got.tokens.ids_RT.flatten()[ours], rows.tokens.ids_RT.flatten()[right])
                assert torch.equal(got.tokens.positions_RT.flatten()[ours], rows.tokens.positions_RT.flatten()[right])


def test_lengths_stay_within_the_positions_that_a_model_has():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [fitted.fitted_length(*case) for case in ((70, cpu, None), (70, cuda, None), (500, cuda, 510))] == [
        70,
        128,
        500,
    ]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a build of torch for CUDA; no card")
def test_on_a_fake_gpu_all_layers_call_the_kernel_by_name():
    rows = pack_groups(random_groups((9, 2, 14)), [], True)
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "attention" in str(func):
                called.append((str(func), args[3].dtype, args[3].untyped_storage()._cdata))
            return func(*args, **(kwargs or {}))

    torch.set_default_device("cuda")
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = ready(mixed_model())
            choose_attention(model, "the policy", torch.device("cuda"), share=True, flex_attention=False)
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            with Record():
                row_logprobs(model, rows.to("cuda"))
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_default_device(None)
    name = "aten._scaled_dot_product_efficient_attention.default"
    assert [call[:2] for call in called] == [(name, torch.bfloat16)] * 2
