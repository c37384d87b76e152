"""A pass that does not fit in memory: it is split, memory is taken back, or the error says what to lower."""

import pytest
import torch

from online_dpo.modeling.memory import DoesNotFit
from support import tiny
from support.training import assert_same, dataset, gradient, trainer, weights, without_times, word_reward

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


# everywhere else ----------------------------------------------------------------------------------------------------

CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


def spent(error):
    def hook(*args, **kwargs):
        raise error

    return hook


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU), MemoryError()])
def test_the_optimizer_s_first_step_leaves_no_checkpoint_of_a_half_done_update(tmp_path, error):
    """AdamW allocates its state in its first step; what it has updated by then, nobody knows."""
    model = tiny.causal_lm(sharpness=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    made = trainer(tmp_path, model=model, max_steps=3, kwargs={"optimizers": (optimizer, None)})
    optimizer.register_step_pre_hook(spent(error))
    with pytest.raises(DoesNotFit) as caught:
        made.train()
    assert str(caught.value).startswith("Memory ran out in the update of step 1, which is half done, so that no ")
    assert "`optim: adafactor`" in str(caught.value) and "\n" not in str(caught.value)
    assert not [*tmp_path.glob("checkpoint-*")]


def test_one_later_has_the_checkpoint_before_it(tmp_path):
    def made(folder):
        model = tiny.causal_lm(sharpness=1.0)
        optimizers = (torch.optim.AdamW(model.parameters(), lr=1e-3), None)
        fields = dict(max_steps=4, save_strategy="steps", save_steps=1)
        return trainer(folder, model=model, kwargs={"optimizers": optimizers}, **fields), optimizers[0]

    steps = []

    def third(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    failing, optimizer = made(tmp_path)
    optimizer.register_step_post_hook(third)
    with pytest.raises(DoesNotFit, match="in the update of step 3"):
        failing.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    whole, resumed = made(tmp_path / "whole")[0], made(tmp_path)[0]
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(weights(resumed.model)[name], weight) for name, weight in weights(whole.model).items())


LIBRARIES = {
    "a CPU": RuntimeError(CPU),
    "a graph": torch.AcceleratorError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("where", ["reward", "reference", "sampling"])
def test_where_nothing_can_be_divided_the_steps_done_are_saved(tmp_path, where, library):
    made = trainer(tmp_path, max_steps=4)
    calls = []

    def from_step_2(module, args, output=None):
        calls.append(1)
        if made.state.global_step == 2:
            raise LIBRARIES[library]

    def reward(completions, **columns):
        from_step_2(None, None)
        return word_reward(completions)

    if where == "reward":
        made = trainer(tmp_path, reward_funcs=reward, max_steps=4)
    elif where == "reference":
        made.reference.model.register_forward_hook(from_step_2)
    else:
        made.policy.model.register_forward_hook(from_step_2)
    with pytest.raises(DoesNotFit, match=r"Lower `") as caught:
        made.train()
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
def test_a_reference_that_does_not_fit_splits_the_pass_and_keeps_the_gradient(tmp_path):
    options = dict(per_device_train_batch_size=6)
    expected = gradient(tmp_path, **options)
    reference = tiny.causal_lm(sharpness=1.0)

    def room(module, args, output):
        if len(output[0]) > TOKENS_WITH_ROOM:
            raise RuntimeError(CPU)

    reference.register_forward_hook(room)
    assert_same(gradient(tmp_path, kwargs={"ref_model": reference}, **options), expected, 1e-5)


def test_an_evaluation_that_does_not_fit_is_computed_in_halves(tmp_path):
    held_out = {"eval_dataset": dataset(lengths=(5, 9, 3, 7))}
    expected = trainer(tmp_path, kwargs=held_out).evaluate()
    reference = tiny.causal_lm(sharpness=1.0)

    def room(module, args, output):
        if isinstance(output, tuple) and len(output[0]) > TOKENS_WITH_ROOM:
            raise RuntimeError(CPU)

    made = trainer(tmp_path, kwargs={"ref_model": reference, **held_out})
    reference.register_forward_hook(room)
    ours, theirs = (without_times(log) for log in (made.evaluate(), expected))
    same = [name for name in theirs if "_per_second" not in name and "runtime" not in name and "time" not in name]
    assert [ours[name] for name in same] == pytest.approx([theirs[name] for name in same], rel=1e-5, abs=1e-6)
