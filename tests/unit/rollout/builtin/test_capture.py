"""A capture that fails leaves nothing behind, and is made again or told.

There is no GPU here. `Card` stands for what a capture touches in torch, by the sources of torch 2.11: the order of
calls in `CUDAGraph::capture_begin` and `capture_end`, the pools of both allocators, the state of the generator.
`torch.cuda.graph` is torch's own.
"""

import inspect
from contextlib import nullcontext
from threading import Thread

import pytest
import torch

from online_dpo.distributed.device_memory import empty_device_cache
from online_dpo.modeling.compiling import recompilation_limit
from online_dpo.rollout.builtin import compiled_steps, cuda_graphs, engine
from online_dpo.rollout.builtin.capture import NotCapturableError, _still_pointed_at, capture
from online_dpo.rollout.builtin.cuda_graphs import StepGraphs
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.runs.events import listening
from support import tiny

CUDA = torch.device("cuda", 0)
INVALID = "CUDA error: operation failed due to a previous error during capture"
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


class State:
    """`CUDAGeneratorState` of 2.11."""

    def __init__(self, offset=0):
        self.offset, self.capturing = offset, False


class Generator:
    def __init__(self, state):
        self.state = state

    def graphsafe_get_state(self):
        return Generator(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state

    def clone_state(self):
        return Generator(State(self.state.offset))

    def draw(self):
        if self.state.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state.offset += 4


class Stream:
    device_index = 0

    def __init__(self, device=None):
        pass

    def wait_stream(self, stream):
        pass


class Card:
    """Two allocators, a generator, graphs."""

    def __init__(self):
        self.recording, self.recording_pinned, self.pools = set(), set(), {}
        self.generator, self.handles, self.graphs = Generator(State()), 0, []
        self.valid, self.fails_to_instantiate = True, []

    def handle(self):
        self.handles += 1
        return (0, self.handles)

    def begin(self, pool):
        assert pool not in self.recording and pool not in self.recording_pinned
        self.recording.add(pool)
        self.recording_pinned.add(pool)
        self.pools[pool] = self.pools.get(pool, 0) + 1

    def end(self, device, pool):
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, device, pool):
        self.pools[pool] -= 1
        assert self.pools[pool] >= 0

    def empty_cache(self):
        assert not self.recording, "captures_underway.empty() INTERNAL ASSERT FAILED"

    def graph(card):
        class Graph:
            """`CUDAGraph` of 2.11."""

            ended = False

            def capture_begin(self, pool, capture_error_mode, **of_later_versions):
                assert capture_error_mode == "thread_local"
                self.pool, self.state = pool, card.generator.state
                self.state.capturing = True
                card.begin(pool)
                card.valid = True

            def capture_end(self):
                if not card.valid:
                    raise torch.AcceleratorError(INVALID)
                card.end(0, self.pool)
                card.recording_pinned.remove(self.pool)
                self.state.capturing = False
                self.ended = True
                if card.fails_to_instantiate:
                    raise card.fails_to_instantiate.pop()

            def replay(self):
                assert self.ended
                if self.state.capturing:
                    raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

            def reset(self):
                if self.ended:
                    card.release(0, self.pool)
                self.ended = False

            __del__ = reset

        card.graphs.append(Graph())
        return card.graphs.pop()

    def is_clean(self):
        self.empty_cache()
        self.generator.draw()
        return not any(self.pools.values())


@pytest.fixture
def card(monkeypatch):
    card = Card()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", card.empty_cache)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", card.graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", card.handle)
    monkeypatch.setattr(torch.cuda, "default_generators", [card.generator])
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", card.end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", card.release)
    monkeypatch.setattr(cuda_graphs, "empty_device_cache", card.empty_cache)
    return card


def test_the_names_that_are_used_are_torch_s_own():
    assert {"clone_state", "graphsafe_get_state", "graphsafe_set_state"} <= set(dir(torch.Generator))
    assert "capture_error_mode" in inspect.signature(torch.cuda.graph).parameters
    assert torch._C._cuda_endAllocateToPool and torch._C._cuda_releasePool


def test_what_torch_leaves_behind_by_itself(card):
    """What this module is for: after `torch.cuda.graph` alone, the card is not clean."""

    def step():
        card.valid = False
        raise RuntimeError("a library allocates")

    with pytest.raises(torch.AcceleratorError), torch.cuda.graph(card.graph(), (0, 9), Stream(), "thread_local"):
        step()
    with pytest.raises(AssertionError, match="captures_underway"):
        card.empty_cache()
    with pytest.raises(RuntimeError, match="Offset increment"):
        card.generator.draw()


@pytest.mark.parametrize("valid", [True, False], ids=["valid", "invalid"])
@pytest.mark.parametrize("error", [FULL, RuntimeError("cannot be captured")], ids=["memory", "other"])
def test_an_error_in_a_capture(card, valid, error):
    graphs = StepGraphs()
    assert graphs.run("first", lambda: 1, CUDA) == 1
    earlier = graphs._graphs["first"][0]
    calls = []

    def step():
        calls.append(1)
        if len(calls) > 1:  # the first is the warm-up
            card.valid = valid
            raise error

    known = len(_still_pointed_at)
    with pytest.raises(torch.OutOfMemoryError if error is FULL else NotCapturableError) as caught:
        capture(card.graph(), lambda: (step(), step()), graphs._pool, Stream())
    assert caught.value is error or str(error) in str(caught.value) and caught.value.__cause__ is error
    card.empty_cache()
    card.generator.draw()
    earlier.replay()  # another engine's graphs, too, are as before
    assert card.pools == {(0, 1): 1} and len(_still_pointed_at) - known == (not valid)
    graphs.release()
    del earlier
    assert card.is_clean()


def test_a_capture_that_finds_no_memory_is_made_again_with_that_of_the_others(card):
    graphs = StepGraphs()
    for key in "ab":
        graphs.run(key, lambda: 0, CUDA)
    card.fails_to_instantiate = [torch.AcceleratorError("CUDA error: out of memory")]
    assert graphs.run("c", lambda: 3, CUDA) == 3
    assert list(graphs._graphs) == ["c"] and graphs.run("c", lambda: 4, CUDA) == 3, "what was captured"
    card.fails_to_instantiate = [torch.AcceleratorError("CUDA error: out of memory")] * 2
    with pytest.raises(torch.AcceleratorError, match="out of memory"):
        graphs.run("d", lambda: 5, CUDA)
    assert not len(graphs) and card.is_clean()
    assert graphs.run("d", lambda: 5, CUDA) == 5
    graphs.release()
    assert card.is_clean() and graphs._stream is None


def test_an_interruption_in_a_capture_passes_and_leaves_nothing(card):
    def step():
        card.valid = False
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(card.graph(), step, card.handle(), Stream())
    assert card.is_clean()


def emptied_cache():
    empty_device_cache()  # as a scorer does that has found no memory


def compiled_kernel():
    with recompilation_limit(3):  # kernels are timed, for which the whole device is waited for
        pass


@pytest.mark.parametrize("other", [emptied_cache, compiled_kernel])
def test_another_thread_waits_with_what_would_fail_during_a_capture(card, monkeypatch, other):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done, failed = [], []

    def in_thread():
        try:
            other()
            done.append(card.recording.copy())
        except AssertionError as error:
            failed.append(error)

    thread = Thread(target=in_thread)

    def step():
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()

    capture(card.graph(), step, card.handle(), Stream())
    thread.join()
    assert not failed and done == [set()]


def test_compiled_steps_and_other_kernels_have_one_lock_for_torch_s_limit():
    thread = Thread(target=compiled_kernel)
    with compiled_steps._compiler_limits():
        assert torch._dynamo.config.recompile_limit == compiled_steps.MOST_CODES
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join()
    assert torch._dynamo.config.recompile_limit == 8


def test_what_a_step_that_failed_has_begun_is_waited_for(card, monkeypatch):
    """Its buffers are freed for others, while kernels may still write to them."""
    waits = []
    monkeypatch.setattr(Stream, "wait_stream", lambda *streams: waits.append(streams))

    def step():
        raise NotCapturableError("in the warm-up")

    with pytest.raises(NotCapturableError):
        StepGraphs().run("first", step, CUDA)
    (side, begun), (main, awaited) = waits
    assert awaited is side and begun is not side and main is not side


def test_a_capture_that_fails_in_the_middle_of_a_run_is_told_and_sampling_goes_on(monkeypatch, caplog):
    """Steps are captured as their shapes come up: also long after the trial at the start."""
    params, key = SamplingParams(max_new_tokens=12, end_token_ids=()), RolloutKey(seed=3, step=5)

    def sampled(sampler):
        groups = sampler.generate(tiny.prompts((3, 7)), 2, params, key)
        return [completion.token_ids for group in groups for completion in group.completions]

    model = tiny.causal_lm(sharpness=1.5)
    expected = sampled(TransformersEngine(model, tiny.tokenizer(), static_steps=False))
    static = TransformersEngine(model, tiny.tokenizer(), static_steps=True)
    sampled(static)
    static.release()
    own, captures, told = StepGraphs._capture, [], []

    def failing(self, step, device):
        captures.append(1)
        raise NotCapturableError("its capture fails with RuntimeError: no")

    monkeypatch.setattr(StepGraphs, "_capture", failing)
    with listening(told.append):
        assert sampled(static) == expected
    [event] = told
    assert event.message == (
        "Sampling takes a slower path, steps without CUDA graphs: its capture fails with RuntimeError: no."
    )
    assert static._path == engine.DYNAMIC and not static._buffers.layers and len(captures) == 1
    monkeypatch.setattr(StepGraphs, "_capture", own)
    assert sampled(static) == expected
