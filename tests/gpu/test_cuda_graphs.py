"""Decoding steps as CUDA graphs: what they sample, by value; what may go on around their capture.

Tolerances. fp32 has 24 bits, so that logits of up to 30 are known to 2e-6, and a few layers of sums in another order
make it ten times as much: 1e-4 is generous, and a wrong slot, mask or weight changes log-probabilities by 0.01 to 10.
bf16 has 8 bits: how much it costs depends on the model. So the same model's plain forward pass under autocast is
measured beside it, and decoding may be wrong by twice as much: both round the same products, in another order.
"""

import logging
import threading
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.builtin.sampling import next_tokens
from online_dpo.rollout.params import RolloutKey, SamplingParams
from support import tiny
from support.on_gpu import change, in_fp64, logprobs_alone, model

KEY = RolloutKey(seed=3, step=5)
PARAMS = SamplingParams(max_new_tokens=80, end_token_ids=(tiny.EOS, tiny.END))
MOST_IN_REHEARSALS = 10
LENGTHS = (3, 70, 1, 33, 64)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


def engine(one, static=True, batch_size=64):
    return TransformersEngine(one, tiny.tokenizer(), batch_size, static_steps=static)


def groups(sampler, lengths=LENGTHS, k=3, params=PARAMS, key=KEY):
    if next(sampler.model.parameters()).device.type == "cpu":  # a rehearsal
        params = replace(params, max_new_tokens=min(params.max_new_tokens, MOST_IN_REHEARSALS))
    return sampler.generate(tiny.prompts(lengths), k, params, key)


def completions(sampler, **options):
    return [completion for group in groups(sampler, **options) for completion in group.completions]


def assert_same(found, expected, atol):
    for mine, other in zip(found, expected, strict=True):
        assert (mine.token_ids, mine.finish_reason) == (other.token_ids, other.finish_reason)
        assert mine.logprobs == pytest.approx(other.logprobs, abs=atol)


def errors(sampled, reference):
    """The difference of each sampled log-probability from that of fp64."""
    return torch.cat(
        [
            torch.tensor(c.logprobs, dtype=torch.float64)
            - logprobs_alone(reference, group.prompt.token_ids, c.token_ids)
            for group in sampled
            for c in group.completions
        ]
    ).abs()


def errors_of_plain_passes(sampled, one, reference, device):
    """The same for plain forward passes over the same completions under autocast."""
    found = []
    for group in sampled:
        for c in group.completions:
            with torch.autocast(device.type, torch.bfloat16):
                plain = logprobs_alone(one, group.prompt.token_ids, c.token_ids)
            found.append(plain - logprobs_alone(reference, group.prompt.token_ids, c.token_ids))
    return torch.cat(found).abs()


def assert_static(sampler, device):
    """The steps were static, and on a GPU captured and not run one by one."""
    assert sampler._path == "static"
    kept = sampler._buffers.graphs
    assert kept.captured > 0
    if device.type == "cuda":
        assert all(graph is not None for graph, _ in kept._graphs.values())


def test_products_of_fp32_are_not_rounded_to_tf32(device):
    """What the tolerances here rest on."""
    assert not torch.backends.cuda.matmul.allow_tf32
    a_XX, b_XX = torch.randn(512, 512, device=device), torch.randn(512, 512, device=device)
    assert float((a_XX @ b_XX - (a_XX.double() @ b_XX.double())).abs().max()) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_sample_what_steps_without_them_sample_call_after_call(family, device, caplog):
    one = model(family, device)
    static, dynamic = engine(one), engine(one, static=False)
    with caplog.at_level(logging.WARNING):
        for seed in range(2):
            sampled = groups(static)
            assert_same([c for group in sampled for c in group.completions], completions(dynamic), atol=1e-4)
            assert float(errors(sampled, in_fp64(one)).max()) < 1e-4
            change(one, seed)
    assert caplog.records == []
    assert_static(static, device)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_under_autocast_is_as_near_to_fp64_as_a_plain_pass(family, device, caplog):
    one = model(family, device)
    static = engine(one)
    with caplog.at_level(logging.WARNING):
        for seed in range(2):
            with torch.autocast(device.type, torch.bfloat16):
                sampled = groups(static)
            reference = in_fp64(one)
            found, plain = errors(sampled, reference), errors_of_plain_passes(sampled, one, reference, device)
            assert float(found.mean()) <= 2 * float(plain.mean()) + 1e-3
            assert float(found.max()) <= 3 * float(plain.max()) + 1e-2
            change(one, seed)  # the copies in bf16 have to follow
    assert caplog.records == []
    assert_static(static, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_with_an_adapter(dtype, device, caplog):
    one = get_peft_model(model("qwen2", device), LORA).eval()
    static = engine(one)
    with caplog.at_level(logging.WARNING):
        for seed in range(2):
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                sampled = groups(static)
            reference = in_fp64(one)
            found = errors(sampled, reference)
            if dtype == torch.float32:
                assert float(found.max()) < 1e-4
            else:
                plain = errors_of_plain_passes(sampled, one, reference, device)
                # merged weights are rounded once more than products that are added
                assert float(found.mean()) <= 3 * float(plain.mean()) + 1e-3
            with one.disable_adapter():
                without = errors(sampled, in_fp64(one.get_base_model()))
            assert float(without.mean()) > 3 * float(found.mean()), "the adapter changes something"
            change(one, seed)
    assert caplog.records == []
    assert_static(static, device)


def test_capture_while_a_second_thread_scores(device, caplog):
    """It allocates, frees and waits for the GPU: none of it may end up in a graph, or end a capture."""
    one, scorer = model("llama", device), model("qwen2", device)
    expected = completions(engine(one))
    ids = torch.randint(4, tiny.VOCABULARY, (4, 200), generator=torch.Generator().manual_seed(0)).to(device)
    stop, found, problems = threading.Event(), [], []

    @torch.no_grad()
    def score():
        try:
            size = 0
            while not stop.is_set():
                size = (size + 1) % 50
                kept = torch.empty(1 + size * 2**16, device=device)
                found.append(float(scorer(input_ids=ids).logits.float().logsumexp(-1).sum() + 0 * kept[0].nan_to_num()))
        except Exception as error:
            problems.append(error)

    score_once = threading.Thread(target=score)
    with caplog.at_level(logging.WARNING):
        score_once.start()
        try:
            for _ in range(3):  # each engine captures graphs of its own
                static = engine(one)
                before = len(found)
                assert_same(completions(static), expected, atol=1e-4)
                assert_static(static, device)
                assert len(found) > before, "the other thread has scored meanwhile"
        finally:
            stop.set()
            score_once.join(timeout=60)
    assert not problems and not score_once.is_alive() and caplog.records == []
    assert max(found) - min(found) <= 1e-5 * abs(found[0])


def test_sizes_options_and_batches_in_between(device):
    one = model("mistral", device)
    static, dynamic = engine(one, batch_size=24), engine(one, static=False, batch_size=24)
    reshaped = dict(temperature=0.7, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=1.3)
    for number, (lengths, k, new, options) in enumerate(
        [
            ((3, 5), 2, 6, {}),
            ((120, 2, 9, 9, 1), 4, 70, {}),
            ((3,), 7, 9, reshaped),
            ((200, 4), 1, 130, {}),
            (LENGTHS, 3, 30, reshaped),
        ]
    ):
        params, key = replace(PARAMS, max_new_tokens=new, **options), RolloutKey(1, number)
        expected = completions(dynamic, lengths=lengths, k=k, params=params, key=key)
        assert_same(completions(static, lengths=lengths, k=k, params=params, key=key), expected, atol=1e-4)


def test_memory_stays_flat_and_goes_when_it_is_released(card):
    one = model("llama", card)
    static = engine(one)
    torch.cuda.synchronize()
    empty = torch.cuda.memory_allocated()
    completions(static)
    torch.cuda.synchronize()
    after_one = torch.cuda.memory_allocated()
    for step in range(8):
        completions(static, key=RolloutKey(0, step))
    torch.cuda.synchronize()
    # later calls may meet numbers of sequences that the first did not, and capture a few graphs more
    assert torch.cuda.memory_allocated() <= after_one + 2**22
    static.release()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= empty + 2**20


def test_a_step_that_cannot_be_captured_leaves_the_device_usable(card, caplog):
    """`synchronize` passes the check before the capture, and ends the capture itself."""
    one = model("llama", card)
    expected = completions(engine(one, static=False))
    hook = one.model.layers[1].mlp.register_forward_hook(lambda *_: torch.cuda.synchronize())
    with caplog.at_level(logging.WARNING):
        assert_same(completions(engine(one)), expected, atol=1e-4)
    assert any("slower path" in record.getMessage() for record in caplog.records)
    hook.remove()
    assert torch.randn(8, device=card).isfinite().all(), "the generator is not left in a capture"
    static = engine(one)
    assert_same(completions(static), expected, atol=1e-4)
    assert_static(static, card)


@pytest.mark.parametrize("options", [{}, dict(top_p=0.8, top_k=20, min_p=0.01, temperature=0.7)])
def test_draws_under_deterministic_algorithms(options, device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # as transformers' `full_determinism` sets it
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(64, 5000, generator=generator).mul(3).to(device)
    uniform_B = torch.rand(64, generator=generator).to(device)
    params = replace(PARAMS, **options)
    plain_B, plain_logps_B = next_tokens(logits_BV.clone(), logits_BV, uniform_B, params, None)
    torch.use_deterministic_algorithms(True)
    try:
        token_B, logps_B = next_tokens(logits_BV.clone(), logits_BV, uniform_B, params, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(token_B, plain_B)
    right_B = logits_BV.double().log_softmax(-1).gather(-1, token_B[:, None])[:, 0]
    torch.testing.assert_close(logps_B.double(), right_B, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logps_B, plain_logps_B, atol=1e-6, rtol=1e-6)
