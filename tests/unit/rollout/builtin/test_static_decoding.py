"""Steps of static shapes against those of our other decoder, and that nothing in them keeps a GPU from replaying them.

The graphs themselves need a GPU: here the same steps run one by one.
"""

import logging
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.generation.stopping_criteria import StopStringCriteria

from online_dpo import OnlineDPOConfig
from online_dpo.modeling.introspection import forward_state_key
from online_dpo.rollout.builtin import static_decoding
from online_dpo.rollout.builtin.batch import Batch
from online_dpo.rollout.builtin.cuda_graphs import CapturableOnly, NotCapturableError, StepGraphs
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.builtin.sampling import next_tokens
from online_dpo.rollout.builtin.static_decoding import (
    StaticBuffers,
    StaticDecoder,
    StaticKVCache,
    can_be_static,
    rounded_up,
)
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.registry import build_engine
from online_dpo.runs.events import listening
from support import tiny

KEY = RolloutKey(seed=3, step=5)
PARAMS = SamplingParams(max_new_tokens=30, end_token_ids=(tiny.EOS, tiny.END, 9, 17))
LENGTHS = (3, 11, 1, 7, 5)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [20, 21, 22, 23], [30, 31, 5]]
SHARPNESS = 1.5


@pytest.fixture(autouse=True)
def few_places(monkeypatch):
    """A step reads few more places than there are, so that a short test meets several widths."""
    monkeypatch.setattr(static_decoding, "SLOT_MULTIPLE", 4)


def engine(model, static=True, batch_size=64):
    return TransformersEngine(model, tiny.tokenizer(), batch_size, static_steps=static)


def completions(sampler, lengths=LENGTHS, k=3, params=PARAMS, key=KEY):
    return [c for g in sampler.generate(tiny.prompts(lengths), k, params, key) for c in g.completions]


def assert_same(found, expected, atol=1e-5):
    for mine, other in zip(found, expected, strict=True):
        assert (mine.token_ids, mine.finish_reason) == (other.token_ids, other.finish_reason)
        assert mine.logprobs == pytest.approx(other.logprobs, abs=atol)


def change(model):
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def alone(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_same_tokens_as_our_other_decoder_call_after_call(family, caplog):
    model = tiny.causal_lm(family, sharpness=SHARPNESS)
    static, dynamic = engine(model), engine(model, static=False)
    first = completions(dynamic)
    assert len({len(c.token_ids) for c in first}) > 5
    with caplog.at_level(logging.WARNING):
        assert_same(completions(static), first)
    assert caplog.records == [], "it is the static steps that are tested"
    assert static._buffers.graphs.captured > 6, "several widths and numbers of sequences"
    change(model)
    second = completions(dynamic)
    assert_same(completions(static), second)
    assert [c.token_ids for c in first] != [c.token_ids for c in second]
    captured = static._buffers.graphs.captured
    assert_same(completions(static), second)
    assert static._buffers.graphs.captured == captured, "the same steps are not made again"


def test_calls_of_other_sizes_in_between():
    model = tiny.causal_lm(sharpness=SHARPNESS)
    static, dynamic = engine(model, batch_size=8), engine(model, static=False)
    for lengths, k, new in [
        ((3, 5), 2, 6),
        ((12, 2, 9, 9, 1), 4, 30),
        ((3,), 7, 9),
        ((20, 4), 1, 17),
        (LENGTHS, 3, 30),
    ]:
        params = replace(PARAMS, max_new_tokens=new)
        assert_same(completions(static, lengths, k, params), completions(dynamic, lengths, k, params))


RESHAPED = dict(temperature=0.7, top_k=9, top_p=0.8, min_p=0.05)
STOPPED = dict(stop_strings=("w7", "w20"), end_token_ids=(tiny.EOS,))


@pytest.mark.parametrize("options", [RESHAPED, dict(repetition_penalty=1.5), STOPPED])
def test_every_option_of_sampling(options):
    model, params = tiny.causal_lm(sharpness=SHARPNESS), replace(PARAMS, **options)
    static, plain = engine(model), completions(engine(model))
    found = completions(static, params=params)
    assert_same(found, completions(engine(model, static=False), params=params))
    assert [c.token_ids for c in found] != [c.token_ids for c in plain]
    assert_same(completions(static), plain)  # and none of it is left behind


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_step_equals_a_plain_forward_pass(family):
    """With sequences that leave twice: some of a group, whole groups, and before the first step."""
    model, k = tiny.causal_lm(family), 3
    keeps = {0: [[0, 1], [3, 5], [8, 7], [9, 10]], 4: [[1, 0], [5, 4]], 9: [[3]]}
    with torch.no_grad():
        decoder = StaticDecoder(model, PROMPTS, k, 12, StaticBuffers())
        logits_GV = decoder.prefill()
        torch.testing.assert_close(logits_GV[1], alone(model, PROMPTS[1]), atol=2e-5, rtol=1e-5)
        sequences = [list(prompt) for prompt in PROMPTS for _ in range(k)]
        for step in range(12):
            if step in keeps:
                decoder.keep_only(torch.tensor(keeps[step]))
                sequences = [list(sequences[row]) for kept in keeps[step] for row in kept]
            tokens = [(7 * step + 3 * row) % 30 + 4 for row in range(len(sequences))]
            logits_BV = decoder.step(torch.tensor(tokens))
            assert len(logits_BV) == len(sequences)
            for row, token in enumerate(tokens):
                sequences[row].append(token)
                torch.testing.assert_close(logits_BV[row], alone(model, sequences[row]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_shape_and_no_step_depends_on_values(family):
    """Traced without values: what needed one would be an error. Nor does it read what changes from step to step but
    from the inputs: replayed on other inputs, the trace gives what the step gives.
    """
    model = tiny.causal_lm(family)
    params = replace(PARAMS, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    seen_BV, uniform_B = torch.zeros(8, tiny.VOCABULARY, dtype=torch.bool), torch.linspace(0.05, 0.95, 8)
    with torch.no_grad():
        decoder = StaticDecoder(model, PROMPTS, 2, 8, StaticBuffers())
        decoder.prefill()
        decoder.step(torch.tensor([9] * 8))

        def step(token_B, uniform_B, seen_BV):
            logits_BV = decoder._logits(token_B)
            return logits_BV, *next_tokens(logits_BV, logits_BV, uniform_B, params, seen_BV)

        inputs = (torch.tensor([7] * 8), uniform_B, seen_BV)
        traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        decoder.kv_cache.advance()
        seen_BV[:, 5:9] = True
        inputs = (torch.arange(4, 12), uniform_B.flip(0), seen_BV)
        expected = [x.clone() for x in step(*inputs)]
        for found, right in zip(traced(*inputs), expected, strict=True):
            torch.testing.assert_close(found, right)
        torch.testing.assert_close(expected[0][2], alone(model, [12, 9, 6]), atol=2e-5, rtol=1e-5)


class Replay:
    """What a CUDA graph does: the operations of one call on the same memory again, without running its Python."""

    def __init__(self, step):
        self._operations = make_fx(step)()
        self.result = tuple(x.clone() for x in self._operations())

    def replay(self):
        for kept, new in zip(self.result, self._operations(), strict=True):
            kept.copy_(new)


class ReplayedGraphs(StepGraphs):
    replays = 0

    def _capture(self, step, device):
        replay = Replay(step)
        return replay, replay.result

    def run(self, key, step, device):
        self.replays += 1
        return super().run(key, step, device)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("family, layers", [("gpt2", "n_layer"), ("mistral", "num_hidden_layers")])
def test_a_step_captured_once_is_right_in_every_later_call(family, layers):
    """Other prompts, sizes, options and weights: all that a step depends on is in its key or in its memory."""
    model = tiny.causal_lm(family, sharpness=SHARPNESS, **{layers: 1})
    static, dynamic = engine(model), engine(model, static=False)
    sizes = [((14,), 2), ((2, 6, 3), 2), ((3, 14, 1), 2), ((2, 6, 3), 2)]  # the first makes room for long prompts
    options = [{}, {}, {}, dict(repetition_penalty=1.6, temperature=0.6, top_k=7)]
    with torch.backends.mkldnn.flags(enabled=False):  # packed weights are copies with addresses of one call
        completions(static, (1,), 1)
        static.release()
        static._buffers.graphs = graphs = ReplayedGraphs()
        for call, ((lengths, k), option) in enumerate(zip(sizes, options, strict=True)):
            params, key = replace(PARAMS, max_new_tokens=8, **option), RolloutKey(0, call)
            expected = completions(dynamic, lengths, k, params, key)
            assert_same(completions(static, lengths, k, params, key), expected, atol=5e-5)  # as weights grow
            change(model)
    assert graphs.replays > graphs.captured + 8


def test_what_makes_the_host_wait_is_refused():
    x = torch.arange(6.0)
    with CapturableOnly():
        (x[torch.tensor([1, 2])] + x.sum()).masked_fill(x[:2] > 0, 1.0)
        x[torch.tensor([1, 2])] = x[3:5] + 1
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 0),
        lambda: x.nonzero(),
        lambda: x[x > 2],
        lambda: x.unique(),
        lambda: x.repeat_interleave(x.long()),
        lambda: x.to("meta"),
    ):
        with pytest.raises(NotCapturableError, match="makes the host wait"), CapturableOnly():
            wait()


def test_a_model_that_waits_in_its_forward_pass_is_sampled_without_graphs(caplog):
    model = tiny.causal_lm(sharpness=SHARPNESS)
    expected = completions(engine(model, static=False))
    model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: output * float(output.isfinite().all())
    )
    with caplog.at_level(logging.WARNING):
        sampler = engine(model)
        assert_same(completions(sampler), expected)
        assert_same(completions(sampler), expected)
    [record] = caplog.records
    assert "slower path, steps without CUDA graphs: it fails with NotCapturableError" in record.getMessage()


def test_what_an_earlier_call_left_in_memory_does_not_matter():
    """Masked places are multiplied with 0, which makes nothing of a NaN."""
    static = engine(tiny.causal_lm(sharpness=SHARPNESS))
    expected = completions(static)
    for layer in static._buffers.layers.values():
        for tensor in (layer.prompt_keys, layer.prompt_values, layer.keys, layer.values):
            tensor.fill_(torch.nan)
    assert_same(completions(static), expected)


def test_rows_beyond_the_real_ones_ask_for_no_position_that_does_not_exist():
    model = tiny.causal_lm("gpt2", sharpness=SHARPNESS)  # of 128 positions
    static, dynamic = engine(model), engine(model, static=False)
    for lengths, new in (((3,) * 9, 60), ((100,) * 10, 20), ((3,) * 9, 60)):
        params = replace(PARAMS, max_new_tokens=new, end_token_ids=(tiny.EOS,))
        assert_same(completions(static, lengths, 1, params), completions(dynamic, lengths, 1, params))


def test_new_addresses_types_and_adapters_begin_anew():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        tiny.causal_lm(sharpness=SHARPNESS),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    static, dynamic = engine(model), engine(model, static=False)
    seen = set()

    def check(atol=1e-5):
        expected = completions(dynamic)
        assert_same(completions(static), expected, atol)
        seen.add(static._buffers._model_state)
        return expected

    with_adapter = check()
    with model.disable_adapter():
        without = check()
    assert [c.token_ids for c in without] != [c.token_ids for c in with_adapter]
    model.merge_adapter()
    assert_same(check(), with_adapter, atol=1e-4)
    model.unmerge_adapter()
    check(atol=1e-4)
    model.base_model.model.lm_head.weight = torch.nn.Parameter(model.base_model.model.lm_head.weight * 1.1)
    check(atol=1e-4)
    assert len(seen) == 5, "those with the adapter alone differ in where copies of weights are"
    before = forward_state_key(model)
    change(model)
    assert forward_state_key(model) == before


def test_under_autocast_weights_are_cast_once_a_call():
    model = tiny.causal_lm(sharpness=1.0)
    static, dynamic = engine(model), engine(model, static=False)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = completions(static), completions(dynamic)
        same = [a.token_ids == b.token_ids for a, b in zip(found, expected, strict=True)]
        assert sum(same) >= 12, "rounding may turn a draw"
        for a, b, equal in zip(found, expected, same, strict=True):
            if equal:
                assert a.logprobs == pytest.approx(b.logprobs, abs=0.02)
        change(model)
    assert {product.weight.dtype for product in static._buffers.linears._products} == {torch.bfloat16}
    assert all("forward" not in vars(module) for module in model.modules())
    assert_same(completions(static), completions(dynamic))


def test_what_is_done_with_each_token_waits_for_nothing():
    params = replace(PARAMS, repetition_penalty=1.5, top_p=0.9, stop_strings=("w7", "w20"))
    batch = Batch(tiny.prompts(LENGTHS), 2, params, KEY, torch.device("cpu"))
    batch.note_prompt_tokens(tiny.VOCABULARY)
    rows_B, logits_BV = torch.arange(10), torch.randn(10, tiny.VOCABULARY)
    stop_strings = StopStringCriteria(tiny.tokenizer(), ["w7", "w20"])
    stop_strings(rows_B[:, None], None)  # its tables go to the device once
    with CapturableOnly():
        for step in range(3):
            token_B, logps_B = next_tokens(logits_BV, logits_BV, *batch.draw_arguments(step, rows_B))
            batch.write(step, rows_B, token_B, logps_B)
            batch.mark_finished(step, rows_B, token_B, stop_strings)


def test_a_bounded_number_of_graphs_is_kept(caplog):
    graphs, runs, cpu = StepGraphs(max_graphs=2), [], torch.device("cpu")
    for key in "abacab":
        assert graphs.run(key, lambda key=key: runs.append(key) or len(runs), cpu) == len(runs)
        assert len(graphs) <= 2
        assert bool(caplog.records) == (graphs.captured == 4), "only where one is captured that was dropped"
    assert graphs.captured == 4  # a, b, c in place of b, b in place of c
    graphs.run("c", lambda: runs.append("c") or len(runs), cpu)
    [record] = caplog.records
    assert "more than 2 shapes" in record.getMessage() and "captured again" in record.getMessage(), "told once"
    graphs.release()
    assert len(graphs) == 0


def test_graphs_that_were_freed_may_be_captured_again():
    graphs, cpu = StepGraphs(max_graphs=1), torch.device("cpu")
    with listening(lambda event: pytest.fail(event.message)):
        for key in "ab":
            graphs.run(key, lambda: 0, cpu)
        graphs.release()
        graphs.run("a", lambda: 0, cpu)


def test_memory_is_given_back_when_asked_and_when_it_runs_out():
    model = tiny.causal_lm(sharpness=SHARPNESS)
    static = engine(model)
    expected = completions(static)
    assert static._buffers.layers and len(static._buffers.graphs)
    static.release()
    assert not static._buffers.layers and not len(static._buffers.graphs) and not static._buffers._inputs
    assert_same(completions(static), expected)

    def memory_for_four(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 4:
            raise torch.OutOfMemoryError("no room")

    model.model.register_forward_pre_hook(memory_for_four, with_kwargs=True)
    assert_same(completions(static), expected)
    assert static.batch_size <= 4
    assert static._buffers._capacity[1] <= 4, "room for what is decoded at a time now"


def test_a_prompt_that_does_not_fit_with_graphs_is_sampled_without(caplog):
    model = tiny.causal_lm(sharpness=SHARPNESS)
    expected, static = completions(engine(model)), engine(model, batch_size=6)
    completions(static, lengths=(2,))

    def no_room_for_the_longest(module, args, kwargs):
        if isinstance(kwargs["kv_cache"], StaticKVCache):
            raise torch.OutOfMemoryError("no room")

    model.model.register_forward_pre_hook(no_room_for_the_longest, with_kwargs=True)
    with caplog.at_level(logging.WARNING):
        assert_same(completions(static), expected)
    halved, without = [record.getMessage() for record in caplog.records]
    assert "decoding 3 completions at a time" in halved
    assert without == "Sampling ran out of memory; it goes on with steps without CUDA graphs."
    assert not static._buffers.layers


def test_where_static_steps_are_the_rule():
    model = tiny.causal_lm()
    by_itself = TransformersEngine(model, tiny.tokenizer())
    completions(by_itself)
    assert by_itself._buffers.graphs.captured == 0, "not on a CPU"
    assert can_be_static(model)
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0))
    assert not can_be_static(model)


def test_the_configuration_turns_graphs_off(tmp_path):
    for on, static_steps in ((True, None), (False, False)):
        args = OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], cuda_graphs=on)
        assert build_engine(tiny.causal_lm(), tiny.tokenizer(), args).static_steps is static_steps


def test_sizes_are_rounded_up_a_little():
    assert [rounded_up(n) for n in range(1, 19)] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16, 20, 20]
    assert [rounded_up(n, 64) for n in (1, 64, 65, 300, 513, 1025)] == [64, 64, 128, 320, 640, 1280]
    assert len({rounded_up(n, 64) for n in range(1, 4097)}) == 20
    assert all(n <= rounded_up(n) <= 1.25 * n for n in range(1, 2000))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_graphs_on_a_gpu_sample_the_same(family, caplog):
    model = tiny.causal_lm(family, sharpness=SHARPNESS).cuda()
    static, dynamic = engine(model, static=None), engine(model, static=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_same(completions(static), completions(dynamic), atol=1e-4)
            change(model)
    assert caplog.records == []
    captured = static._buffers.graphs.captured
    static.release()
    assert captured and len(static._buffers.graphs) == 0
