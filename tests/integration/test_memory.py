"""A pass that does not fit in memory: it is split, memory is taken back, or the error says what to lower."""

import pytest
import torch

from support import tiny
from support.training import assert_same, gradient, trainer, without_times

TOKENS_WITH_ROOM = 30


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        if len(gradient) > TOKENS_WITH_ROOM:
            raise torch.OutOfMemoryError("no room for the backward pass")
        return gradient


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_running_out_of_memory_splits_the_micro_batch_and_keeps_the_gradient(tmp_path, where):
    def hook(module, args, output):
        if not module.training:
            return
        logps_M, entropy_M = output
        if where == "forward" and len(logps_M) > TOKENS_WITH_ROOM:
            raise torch.OutOfMemoryError("no room for the forward pass")
        if where == "backward":
            return FailingBackward.apply(logps_M), entropy_M

    options = dict(per_device_train_batch_size=6, gradient_accumulation_steps=2)
    expected_log = trainer(tmp_path, **options)
    expected_log.train()
    expected = gradient(tmp_path, **options)
    model = tiny.causal_lm(sharpness=1.0)
    model.register_forward_hook(hook)
    assert_same(gradient(tmp_path, model=model, **options), expected, 1e-5)

    model = tiny.causal_lm(sharpness=1.0)
    model.register_forward_hook(hook)
    small = trainer(tmp_path, model=model, **options)
    small.train()
    assert small.passes.tokens_that_fit < 100

    ours, theirs = (without_times(made.state.log_history[0]) for made in (small, expected_log))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("room", [True, False])
def test_memory_that_sampling_keeps_is_taken_back_when_a_pass_does_not_fit(tmp_path, room):
    def hook(module, args, output):
        if module.training and not room and len(output[0]) > TOKENS_WITH_ROOM:
            raise torch.OutOfMemoryError("no room for the forward pass")

    model = tiny.causal_lm(sharpness=1.0)
    model.register_forward_hook(hook)
    made = trainer(tmp_path, model=model, per_device_train_batch_size=6)
    made.sampler.engine.static_steps = True
    made.train()
    assert bool(made.sampler.engine._buffers.layers) == room


@pytest.mark.slow
def test_a_single_pair_that_does_not_fit_says_what_to_do(tmp_path):
    def hook(module, args, output):
        if module.training:
            raise torch.OutOfMemoryError("never any room")

    model = tiny.causal_lm(sharpness=1.0)
    model.register_forward_hook(hook)
    with pytest.raises(torch.OutOfMemoryError, match="Lower `max_tokens_per_pass`"):
        trainer(tmp_path, model=model).train()
