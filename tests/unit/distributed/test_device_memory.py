"""Memory that is kept between calls is given back when memory is short, and made again when it is needed."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from online_dpo.distributed import device_memory, sampling
from online_dpo.distributed.device_memory import Kept, free_kept_memory
from online_dpo.distributed.sampling import fits_whole
from online_dpo.modeling.memory import Halving, forget_tensors
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.colocated_engine import VLLMColocateEngine
from support import tiny

PARAMS, KEY = SamplingParams(max_new_tokens=12, end_token_ids=()), RolloutKey(seed=3, step=5)


class Owner:
    def __init__(self):
        self.buffer = torch.zeros(1000)
        self.kept = Kept(self.release)
        self.weak = weakref.ref(self.buffer.untyped_storage())

    def release(self):
        self.buffer = None


def test_what_is_kept_is_freed_unless_it_is_in_use():
    one, other = Owner(), Owner()
    with one.kept.in_use(), one.kept.in_use():
        free_kept_memory()
        assert one.weak() is not None and other.weak() is None
    free_kept_memory()
    assert one.weak() is None


def test_an_owner_that_is_gone_is_forgotten():
    owner = Owner()
    kept = weakref.ref(owner.kept)
    assert owner.kept in device_memory._all_kept
    del owner
    gc.collect()
    assert kept() is None


def sampled(engine, count=2):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        groups = engine.generate(tiny.prompts((3, 7)), count, PARAMS, KEY)
    return [completion.token_ids for group in groups for completion in group.completions]


def tensors_of(kept):
    """The tensors in an object of ours, wherever they stand in it."""
    if isinstance(kept, torch.Tensor):
        yield kept
    elif isinstance(kept, dict):
        for one in kept.values():
            yield from tensors_of(one)
    elif isinstance(kept, (list, tuple)):
        for one in kept:
            yield from tensors_of(one)
    elif type(kept).__module__.startswith("online_dpo.rollout"):
        yield from tensors_of(vars(kept))


def storages(buffers):
    """Weak references to all memory that static steps keep, and the bytes of the copies of weights."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors_of(buffers)}
    copies = [t for t in storages.values() if t.dtype == torch.bfloat16 and t.dim() == 2]
    return [weakref.ref(t.untyped_storage()) for t in storages.values()], sum(
        t.untyped_storage().nbytes() for t in copies
    )


def test_the_sampler_s_buffers_go_back_and_the_next_call_makes_them_again():
    model = tiny.causal_lm(sharpness=1.5)
    engine = TransformersEngine(model, tiny.tokenizer(), static_steps=True)
    expected = sampled(engine)
    weak, copies = storages(engine._buffers)
    linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
    assert weak and copies == sum(2 * m.weight.numel() for m in linears)
    free_kept_memory()
    assert not any(one() is not None for one in weak) and not len(engine._buffers.graphs)
    assert sampled(engine) == expected
    with engine._kept.in_use():  # such as from a thread that scores while this one samples
        free_kept_memory()
        engine.release()
        assert engine._buffers.layers
    engine.release()
    assert not engine._buffers.layers


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError("full")])
def test_a_scorer_that_finds_no_memory_gets_that_of_the_sampler(error):
    engine = TransformersEngine(tiny.causal_lm(sharpness=1.5), tiny.tokenizer(), static_steps=True)
    sampled(engine)

    def scores(texts):
        if engine._buffers.layers:
            raise error
        return texts

    assert Halving("Reward model `rm`")([1, 2, 3, 4], scores) == [1, 2, 3, 4]


def test_whole_weights_of_a_sharded_model_find_room_where_something_can_be_freed(monkeypatch):
    model, owner = tiny.causal_lm(), Owner()
    size = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(sampling, "free_memory", lambda device: 0 if owner.buffer is not None else 2 * size)
    assert fits_whole(model, torch.device("cpu")) and owner.buffer is None
    monkeypatch.setattr(sampling, "free_memory", lambda device: size)
    assert not fits_whole(model, torch.device("cpu"))


def test_vllm_wakes_up_in_memory_that_nobody_holds_without_using_it():
    owner, woken = Owner(), []
    engine = VLLMColocateEngine.__new__(VLLMColocateEngine)
    engine._llm = SimpleNamespace(wake_up=lambda parts: woken.append((parts, owner.buffer)))
    engine._asleep = {"weights", "kv_cache"}
    engine._wake("weights")
    assert woken == [(["weights"], None)]
    engine._wake("weights")
    assert len(woken) == 1


def test_an_error_s_frames_keep_no_tensors():
    weak = []

    def forward():
        activations = torch.zeros(1000)
        weak.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def caller():
        try:
            forward()
        except RuntimeError as error:
            raise ValueError("wrapped") from error

    with pytest.raises(ValueError) as caught:
        caller()
    assert weak[0]() is not None
    forget_tensors(caught.value)
    assert weak[0]() is None
