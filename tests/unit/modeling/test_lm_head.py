"""Log-probabilities and entropies of tokens, and their gradients, against log-softmax in double."""

import pytest
import torch
import torch.nn.functional as F

from online_dpo.modeling.lm_head import LinearLogprobs, TokenLogprobs

M, H, V = 11, 6, 9


def inputs(bias=True):
    torch.manual_seed(0)
    hidden, weight = torch.randn(M, H) * 3, torch.randn(V, H)
    return hidden, weight, torch.randn(V) if bias else None, torch.randint(V, (M,)), torch.randn(M)


def expected(hidden, weight, bias, target, factor):
    """Log-probabilities, entropies, and the gradients of a weighted sum of the former, all in double."""
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logps = F.linear(leaves[0], leaves[1], leaves[2] if bias is not None else None).log_softmax(-1)
    picked = logps.gather(-1, target[:, None])[:, 0]
    gradients = torch.autograd.grad((picked * factor).sum(), leaves)
    return picked, -(logps.exp() * logps).sum(-1), gradients


@pytest.mark.parametrize("size", [1, 4, 11, 50])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_head_in_chunks(bias, size):
    hidden, weight, offset, target, factor = inputs(bias)
    logps, entropy, gradients = expected(hidden, weight, offset, target, factor)
    leaves = [x.requires_grad_() for x in (hidden, weight, offset) if x is not None]
    got, got_entropy = LinearLogprobs.apply(hidden, weight, offset, target, True, size)
    torch.testing.assert_close(got, logps.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_entropy, entropy.float(), atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((got * factor).sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(mine, theirs.float(), atol=1e-5, rtol=1e-4)
    assert not got_entropy.requires_grad


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_trained_gets_a_gradient(trained):
    hidden, weight, bias, target, factor = inputs()
    _, _, gradients = expected(hidden, weight, bias, target, factor)
    leaves = [x.requires_grad_(wanted) for x, wanted in zip((hidden, weight, bias), trained, strict=True)]
    got, _ = LinearLogprobs.apply(*leaves, target, True, 4)
    (got * factor).sum().backward()
    for leaf, wanted, theirs in zip(leaves, trained, gradients, strict=True):
        if wanted:
            torch.testing.assert_close(leaf.grad, theirs.float(), atol=1e-5, rtol=1e-4)
        else:
            assert leaf.grad is None


def test_a_frozen_head_keeps_no_logits_for_the_backward_pass():
    hidden, weight, bias, target, _ = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        LinearLogprobs.apply(hidden.requires_grad_(), weight, bias, target, True, 4)
    assert kept == [(M, H)]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_in_bf16_it_rounds_no_more_than_a_linear_layer_in_bf16(autocast, frozen):
    hidden, weight, bias, target, factor = inputs()
    logps, entropy, gradients = expected(hidden, weight, bias, target, factor)
    if not autocast:
        hidden, weight, bias = hidden.bfloat16(), weight.bfloat16(), bias.bfloat16()
    leaves = [hidden.requires_grad_(), weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, got_entropy = LinearLogprobs.apply(*leaves, target, True, 4)
    assert got.dtype == got_entropy.dtype == torch.float32
    torch.testing.assert_close(got, logps.float(), atol=0.1, rtol=0.02)
    torch.testing.assert_close(got_entropy, entropy.float(), atol=0.05, rtol=0.05)
    (got * factor).sum().backward()
    for leaf, theirs in zip(leaves, gradients, strict=True):
        if leaf.requires_grad:
            assert leaf.grad.dtype == leaf.dtype
            assert (leaf.grad.double() - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("size", [1, 50])
def test_in_bf16_tokens_that_are_nearly_certain_keep_their_gradient(frozen, size):
    """Their gradient is a small difference: taken after rounding, nothing would be left of it."""
    weight, target = torch.eye(V).bfloat16(), torch.arange(4)
    hidden = torch.diag(torch.tensor([4.0, 8.0, 9.0, 10.0, 0, 0, 0, 0, 0]))[:4].bfloat16()  # logits exact in bf16
    exact = hidden.double().requires_grad_()
    logps = (exact @ weight.double().t()).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    assert (logps.exp() > 0.998).sum() == 2
    [expected_MH] = torch.autograd.grad(logps.sum(), exact)
    hidden.requires_grad_()
    got, _ = LinearLogprobs.apply(hidden, weight.requires_grad_(not frozen), None, target, False, size)
    [got_MH] = torch.autograd.grad(got.sum(), hidden)
    error_M = (got_MH.double() - expected_MH).norm(dim=1) / expected_MH.norm(dim=1)
    assert error_M.max() < 0.1, error_M


def test_logits_as_they_are():
    _, _, _, target, factor = inputs()
    logits = (torch.randn(M, V) * 4).requires_grad_()
    kept = logits.detach().clone()
    got, entropy = TokenLogprobs.apply(logits, target, True)
    logps = logits.double().log_softmax(-1)
    picked = logps.gather(-1, target[:, None])[:, 0]
    torch.testing.assert_close(got, picked.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(logps.exp() * logps).sum(-1).float(), atol=1e-5, rtol=1e-5)
    [theirs] = torch.autograd.grad((picked * factor).sum(), logits)
    [mine] = torch.autograd.grad((got * factor).sum(), logits)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits, kept)


def test_impossible_tokens_and_logits_that_are_not_finite():
    low = float("-inf")
    logits = torch.tensor([[0.0, 1.0, low], [low, 0.0, 0.0], [float("nan"), 0.0, 0.0], [float("inf"), 0.0, 0.0]])
    logps, entropy = TokenLogprobs.apply(logits, torch.tensor([1, 0, 1, 0]), True)
    p = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(logps[:2], torch.tensor([p.log(), low]))
    torch.testing.assert_close(entropy[:2], torch.tensor([-(p * p.log() + (1 - p) * (1 - p).log()), 0.6931472]))
    assert not logps[2:].isfinite().any()


def test_without_entropy_it_is_zero():
    hidden, weight, bias, target, _ = inputs()
    with_it, without = (LinearLogprobs.apply(hidden, weight, bias, target, wanted, 4) for wanted in (True, False))
    assert torch.equal(with_it[0], without[0]) and without[1].eq(0).all()
