"""The head as a GPU computes it, on a CPU: values against log-softmax in double, and the bytes of logits it moves."""

import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import compile_fx, config, metrics

from online_dpo.modeling import fused_head
from online_dpo.modeling.fused_head import FusedLinearLogprobs, FusedTokenLogprobs
from online_dpo.modeling.lm_head import LinearLogprobs
from online_dpo.modeling.logit_kernels import UNCOMPILED, compiled_kernels, logit_gradient, softmax_sums
from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from online_dpo.packing.pack import pack_pairs
from online_dpo.types import Pair
from support import tiny
from support.half_products import half_products_on_cpu

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import head_passes  # noqa: E402

H = 6
CASES = head_passes.CASES


@pytest.fixture(autouse=True)
def half_products():
    with half_products_on_cpu():
        yield


def inputs(tokens, vocabulary, dtype, bias=True, sharpness=1.0):
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    hidden, weight = (torch.randn(n, H, generator=generator) for n in (tokens, vocabulary))
    offset = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    factor = torch.randn(tokens, generator=generator)
    return (hidden * sharpness).to(dtype), weight.to(dtype), offset, target, factor


def expected(hidden, weight, bias, target, factor):
    """Log-probabilities, entropies, and the gradients of a weighted sum of the former, all in double."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logps = F.linear(*leaves).log_softmax(-1)
    picked = logps.gather(-1, target[:, None])[:, 0]
    gradients = torch.autograd.grad((picked * factor).sum(), leaves)
    return picked, -(logps.exp() * logps.clamp(min=-1e30)).sum(-1), gradients


def assert_right(given, size, kernels=UNCOMPILED, frozen=False):
    hidden, weight, bias, target, factor = given
    rounding = 1e-5 if hidden.dtype == torch.float32 else 1e-2
    leaves = [hidden.requires_grad_()] + [x.requires_grad_(not frozen) for x in (weight, bias) if x is not None]
    got, got_entropy = FusedLinearLogprobs.apply(hidden, weight, bias, target, True, size, kernels)
    logps, entropy, gradients = expected(*given)
    assert got.dtype == got_entropy.dtype == torch.float32 and not got_entropy.requires_grad
    torch.testing.assert_close(got, logps.float(), atol=2e-5, rtol=2e-6)
    torch.testing.assert_close(got_entropy, entropy.float(), atol=2e-5, rtol=1e-5)
    (got * factor).sum().backward()
    for leaf, theirs in zip(leaves, gradients, strict=True):
        if leaf.requires_grad:
            assert leaf.grad.dtype == leaf.dtype
            assert (leaf.grad.double() - theirs).norm() <= rounding * theirs.norm()
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("vocabulary", [9, 1024, 2048, 3001])  # less than a block, whole blocks, and blocks with a rest
def test_values_in_chunks(vocabulary, frozen, dtype):
    for size in (1, 4, 11, 50):  # borders within, a last chunk that is short, one chunk
        for bias in (True, False):
            assert_right(inputs(11, vocabulary, dtype, bias), size, frozen=frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_for_any_number_of_tokens(dtype):
    compiled = compiled_kernels()
    for tokens, size in ((11, 4), (7, 50), (1, 4)):
        assert_right(inputs(tokens, 1500, dtype), size, compiled)
        assert_right(inputs(tokens, 1500, dtype), size, compiled, frozen=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens in (2, 3, 9):
        assert_right(inputs(tokens, 1500, dtype), 6, compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("frozen", [True, False])
def test_no_token_at_all(frozen):
    hidden, weight, bias, target, _ = inputs(0, 9, torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_(not frozen), bias
    got = FusedLinearLogprobs.apply(*leaves, target, True, 4, UNCOMPILED)
    theirs = LinearLogprobs.apply(*leaves, target, True, 4)
    for logps, entropy in (got, theirs):
        assert logps.shape == entropy.shape == (0,)
        logps.sum().backward()
    assert hidden.grad.shape == (0, H) and (frozen or weight.grad.eq(0).all())


@pytest.mark.parametrize("only", [0, 1, 2])
def test_only_what_is_trained_gets_a_gradient(only):
    hidden, weight, bias, target, factor = inputs(11, 9, torch.float32)
    leaves = [x.requires_grad_(index == only) for index, x in enumerate((hidden, weight, bias))]
    (FusedLinearLogprobs.apply(*leaves, target, True, 4, UNCOMPILED)[0] * factor).sum().backward()
    gradients = expected(hidden, weight, bias, target, factor)[2]
    for index, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (index != only)
    torch.testing.assert_close(leaves[only].grad, gradients[only].float(), atol=1e-5, rtol=1e-4)


def test_under_autocast_it_keeps_the_types_of_what_is_given():
    hidden, weight, bias, target, factor = inputs(11, 3001, torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = FusedLinearLogprobs.apply(*leaves, target, True, 4, UNCOMPILED)
    (logps * factor).sum().backward()
    rounded = [x.detach().bfloat16().float() for x in (hidden, weight)]
    truth, _, gradients = expected(*rounded, bias, target, factor)
    torch.testing.assert_close(logps, truth.float(), atol=2e-5, rtol=2e-6)
    for leaf, theirs in zip(leaves, gradients, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad.double() - theirs).norm() < 1e-2 * theirs.norm()


def test_logits_in_bf16_are_not_rounded():
    """A product in bf16 that gives bf16 is: there a log-probability of -8 was off by 0.03."""
    hidden, weight, _, target, factor = given = inputs(64, 3001, torch.bfloat16, bias=False, sharpness=4)
    truth, _, _ = expected(*given)
    fused = FusedLinearLogprobs.apply(hidden, weight, None, target, False, 16, UNCOMPILED)[0]
    before = LinearLogprobs.apply(hidden, weight, None, target, False, 16)[0]
    assert (fused - truth).abs().max() < 3e-5 < 0.01 < (before - truth).abs().max()


@pytest.mark.parametrize("kernels", [UNCOMPILED, compiled_kernels()])
@pytest.mark.parametrize("frozen", [True, False])
def test_extreme_logits(kernels, frozen):
    """Logits of 10 000, and columns of minus infinity: padded rows of a vocabulary, a whole block of them."""
    hidden, weight, _, target, factor = inputs(11, 3001, torch.float32, bias=False)
    hidden, weight = hidden * 3000, weight.clone()
    bias = torch.zeros(3001)
    bias[1000:2100] = -torch.inf
    target = target.where((target < 1000) | (target >= 2100), 5)
    assert (hidden @ weight.t()).abs().max() > 1e4
    leaves = hidden.requires_grad_(), weight.requires_grad_(not frozen), bias
    logps, entropy = FusedLinearLogprobs.apply(*leaves, target, True, 4, kernels)
    logits = F.linear(hidden, weight, bias).detach().double()  # the products as fp32 rounds them
    truth = logits.log_softmax(-1)
    torch.testing.assert_close(logps, truth.gather(1, target[:, None])[:, 0].float(), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(entropy, -(truth.exp() * truth.clamp(min=-1e30)).sum(-1).float(), atol=1e-4, rtol=1e-4)
    (logps * factor).sum().backward()
    slopes = factor[:, None] * (F.one_hot(target, 3001) - truth.exp())
    for leaf, theirs in ((hidden, slopes @ weight.double()), (weight, slopes.t() @ hidden.double())):
        if leaf.requires_grad:
            assert (leaf.grad.double() - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("size", [1, 50])
def test_in_bf16_tokens_that_are_nearly_certain_keep_their_gradient(frozen, size):
    weight, target = torch.eye(9).bfloat16(), torch.arange(4)
    hidden = torch.diag(torch.tensor([4.0, 8.0, 9.0, 10.0, 0, 0, 0, 0, 0]))[:4].bfloat16()
    exact = hidden.double().requires_grad_()
    logps = (exact @ weight.double().t()).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    [expected_MH] = torch.autograd.grad(logps.sum(), exact)
    inputs = hidden.requires_grad_(), weight.requires_grad_(not frozen), None, target, False, size, UNCOMPILED
    [got_MH] = torch.autograd.grad(FusedLinearLogprobs.apply(*inputs)[0].sum(), hidden)
    assert ((got_MH.double() - expected_MH).norm(dim=1) / expected_MH.norm(dim=1)).max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_as_a_model_gives_them(dtype):
    logits = (torch.randn(11, 1500, generator=torch.Generator().manual_seed(0)) * 4).to(dtype).requires_grad_()
    kept, target, factor = logits.detach().clone(), torch.arange(11), torch.linspace(-1, 1, 11)
    got, entropy = FusedTokenLogprobs.apply(logits, target, True, UNCOMPILED)
    logps = logits.double().log_softmax(-1)
    picked = logps.gather(-1, target[:, None])[:, 0]
    torch.testing.assert_close(got, picked.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(logps.exp() * logps).sum(-1).float(), atol=1e-5, rtol=1e-5)
    [theirs] = torch.autograd.grad((picked * factor).sum(), logits)
    [mine] = torch.autograd.grad((got * factor).sum(), logits)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)
    assert torch.equal(logits, kept) and mine.dtype == dtype


def test_impossible_tokens_and_logits_that_are_not_finite():
    low = float("-inf")
    rows = [[0.0, 1.0, low], [low, 0.0, 0.0], [float("nan"), 0.0, 0.0], [float("inf"), 0.0, 0.0], [low, low, low]]
    logps, entropy = FusedTokenLogprobs.apply(torch.tensor(rows), torch.tensor([1, 0, 1, 0, 0]), True, UNCOMPILED)
    p = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(logps[:2], torch.tensor([p.log(), low]))
    torch.testing.assert_close(entropy[:2], torch.tensor([-(p * p.log() + (1 - p) * (1 - p).log()), 0.6931472]))
    assert not logps[2:].isfinite().any()


def test_bytes_of_each_logit():
    """A dispatch mode counts them: 14 passes over a chunk of a frozen head were 84 bytes of each logit."""
    counted = {name: [head_passes.moved(fused, **case) for fused in (False, True)] for name, case in CASES.items()}
    assert {name: [round(one.logits) for one in pair] for name, pair in counted.items()} == {
        "log-probabilities alone": [32, 8],
        "with entropies": [56, 8],
        "forward, head frozen": [84, 16],
        "forward, head trained": [56, 8],
        "backward, head trained": [42, 14],
    }
    assert counted["forward, head frozen"][0].passes == 2 * 14
    assert counted["backward, head trained"][1].weight < counted["backward, head trained"][0].weight


def bytes_of_kernels(function, *args):
    """What Inductor's kernels of a function read and write; a gather counts as if it read all that it picks from."""
    log = compile_fx.inductor_metrics_log
    level = log.level
    log.setLevel(logging.INFO)
    torch._dynamo.reset()
    metrics.reset()
    try:
        with config.patch(force_disable_caches=True):
            torch.compile(function)(*args)
    finally:
        log.setLevel(level)
    return metrics.num_bytes_accessed


@pytest.mark.parametrize("entropy", [True, False])
def test_compiled_sums_read_logits_once(entropy):
    logits, target = torch.randn(64, 4096), torch.zeros(64, dtype=torch.long)
    got = bytes_of_kernels(softmax_sums, logits, None, target, entropy) - logits.nbytes  # of which the gather picks 64
    assert got == pytest.approx(logits.nbytes, rel=0.02)


def test_compiled_gradient_reads_logits_once_and_writes_once():
    logits, target = torch.randn(64, 4096)[:, :4000], torch.zeros(64, dtype=torch.long)
    numbers = torch.zeros(3, 64)
    got = bytes_of_kernels(logit_gradient, logits, None, target, *numbers, torch.bfloat16)
    assert got == pytest.approx((4 + 2) * 64 * 4000, rel=0.02)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # a linear head, and one with a soft cap
def test_a_model_whose_device_takes_this_way_has_the_same_gradients(monkeypatch, kind):
    group = tiny.group(tiny.prompts([5])[0], [[7, 3, 9, 4], [8, 2]])
    rows = pack_pairs([Pair(group, 0, 1)], True)
    assert fused_head.DEVICES == ("cuda",)
    got, taken = [], []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(fused_head, "DEVICES", devices)
        monkeypatch.setattr(fused_head, "compiled_kernels", lambda: taken.append(fused_head.DEVICES) or UNCOMPILED)
        model = tiny.causal_lm(kind, sharpness=1.0)
        enable_logprobs(model)
        made = row_logprobs(model, rows)
        (made.logps_S * torch.tensor([1.0, -0.5])).sum().backward()
        got.append((made.token_logps_M.detach(), made.entropy_M, [weight.grad for weight in model.parameters()]))
    torch.testing.assert_close(*got, atol=1e-5, rtol=1e-4)
    assert taken and set(taken) == {("cpu",)}  # it was another way indeed
