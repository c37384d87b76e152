"""What comes and goes within a step, against what a small model allocates."""

import contextlib
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from online_dpo.modeling import logprobs
from online_dpo.modeling.attention import segments
from online_dpo.modeling.attention.choice import use_segments
from online_dpo.modeling.fused_head import FusedLinearLogprobs
from online_dpo.modeling.lm_head import LinearLogprobs
from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from online_dpo.packing.pack import pack_pairs
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.builtin.kv_cache import KVCache
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from online_dpo.sizing import passing
from online_dpo.sizing.passing import activation_bytes, copied_bytes, kv_bytes, layer_bytes_of_a_token, logit_bytes
from online_dpo.sizing.plan import Plan
from online_dpo.sizing.shape import MODELS, shape_of
from online_dpo.types import Pair
from support import tiny
from support.half_products import half_products_on_cpu

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import head_passes  # noqa: E402

KINDS = {"llama": {}, "qwen2": dict(hidden_size=64, intermediate_size=80), "qwen3": dict(head_dim=16)}


def kept_by_a_layer(model, tokens, bf16):
    """Bytes that autograd saves in one layer, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that its address is not used again
        return tensor

    hidden = torch.randn(1, tokens, model.config.hidden_size, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    rotary = {part.untyped_storage().data_ptr() for part in positions}  # the same for all layers
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.model.layers[0](hidden, position_embeddings=positions, attention_mask=None)
    return sum(size for address, (size, _) in kept.items() if address not in rotary)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_keeps(kind, bf16):
    model = tiny.causal_lm(kind, **KINDS[kind]).train()
    of_rows = [kept_by_a_layer(model, tokens, bf16) for tokens in (64, 96)]  # weights that autocast has cast go out
    assert (of_rows[1] - of_rows[0]) / 32 == layer_bytes_of_a_token(shape_of(model.config.to_dict()), bf16)


def test_checkpointing_keeps_the_inputs_and_one_layer():
    plan = Plan(MODELS["0.5B"], tokens_per_pass=1000)
    layer = 1000 * layer_bytes_of_a_token(MODELS["0.5B"], bf16=True)
    assert activation_bytes(plan) == 24 * 1000 * 896 * 4 + layer
    assert activation_bytes(Plan(MODELS["0.5B"], tokens_per_pass=1000, gradient_checkpointing=False)) == 24 * layer


@pytest.mark.parametrize("bf16", [False, True])
def test_keys_and_values_of_a_call(monkeypatch, bf16):
    caches = []
    own = KVCache.advance
    monkeypatch.setattr(KVCache, "advance", lambda self: (own(self), caches.append(measured(self)))[0])

    def measured(cache):
        layers = cache.layers.values()
        return sum(t.nbytes for one in layers for t in (one.prompt_keys, one.prompt_values, one.keys, one.values))

    model = tiny.causal_lm("llama", sharpness=1.0)
    params = SamplingParams(max_new_tokens=16, end_token_ids=())
    engine = TransformersEngine(model, tiny.tokenizer())
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        engine.generate(tiny.prompts([12, 12]), 3, params, RolloutKey(0, 0, Stream.TRAINING))
    plan = Plan(
        shape_of(model.config.to_dict()), bf16=bf16, sequences=6, completions=3, prompt_tokens=12, new_tokens=16
    )
    assert max(caches) == kv_bytes(plan)


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at a time that were made inside."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given and storage.data_ptr() not in self.known:
                    self.known.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage.data_ptr(), storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def freed(self, address, size):
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize("hidden", [64, 1024])  # logits are more, and the head is
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_logits(trained, hidden, on_cpu):
    tokens, vocabulary = 256, 8192
    states = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(vocabulary, hidden, requires_grad=trained, dtype=torch.float32 if trained else torch.bfloat16)
    inputs = states, head, None, torch.zeros(tokens, dtype=torch.long), True, 128
    fused = contextlib.nullcontext() if on_cpu else half_products_on_cpu()
    with fused, torch.autocast("cpu", torch.bfloat16), Peak() as peak:
        if on_cpu:
            logps, _ = LinearLogprobs.apply(*inputs)
        else:
            logps, _ = FusedLinearLogprobs.apply(*inputs, head_passes.KERNELS)
        logps.sum().backward()
    shape = replace(MODELS["0.5B"], hidden=hidden, vocabulary=vocabulary)
    plan = Plan(shape, adapter="none" if trained else "lora", tokens_per_pass=128, on_cpu=on_cpu)
    assert peak.most == pytest.approx(logit_bytes(plan), rel=0.15)


def test_constants_are_those_of_the_model():
    assert passing.CHUNK_LOGITS == logprobs.CHUNK_LOGITS_ELSEWHERE
    assert logprobs.CHUNK_LOGITS["cpu"] == passing.CHUNK_LOGITS_ON_CPU
    assert passing.SEGMENTED == segments.SHORTEST


@pytest.mark.parametrize(("prompt", "answers"), [(40, (30, 25)), (100, (200, 150))])
def test_what_a_pass_keeps_on_a_cpu(prompt, answers):
    """The whole model, with attention over rows that share a prompt: short ones, and long ones in segments."""
    shape = dict(num_hidden_layers=6, hidden_size=64, intermediate_size=128, max_position_embeddings=512)
    model = tiny.causal_lm("qwen2", **shape).train()
    use_segments(model)
    enable_logprobs(model)
    group = tiny.group(tiny.prompts([prompt])[0], [[7] * n for n in answers])
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        row_logprobs(model, pack_pairs([Pair(group, 0, 1)], True))
    got = sum(size for address, (size, _) in kept.items() if address not in weights)
    plan = Plan(
        shape_of(model.config.to_dict()),
        on_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        tokens_per_pass=prompt + sum(answers),
        prompt_tokens=prompt,
        new_tokens=max(answers),
    )
    assert activation_bytes(plan) == pytest.approx(got, rel=0.1)


def test_buckets_of_deepspeed():
    def bucket(**options):
        terms = {term.name: term.gpu for term in passing.pass_terms(Plan(MODELS["7B"], gpus=8, **options))}
        return terms["buckets"]

    assert bucket(sharding="zero2") == 2 * 3584**2
    assert bucket(sharding="zero2", bucket=500_000_000) == 1_000_000_000
    assert bucket(sharding="fsdp2") == bucket() == 0


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("adapter", "bf16"), [("none", True), ("none", False), ("lora", True)])
def test_copies_of_weights_that_sampling_multiplies_with(kind, adapter, bf16):
    model = tiny.causal_lm(kind, sharpness=1.0)
    shape = shape_of(model.config.to_dict())
    if adapter == "lora":
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model.to(torch.bfloat16), lora, autocast_adapter_dtype=False)
    engine = TransformersEngine(model, tiny.tokenizer(), static_steps=True)
    params = SamplingParams(max_new_tokens=4, end_token_ids=())
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        engine.generate(tiny.prompts([12, 12]), 2, params, RolloutKey(0, 0, Stream.TRAINING))
    assert engine._buffers.linears.nbytes == copied_bytes(Plan(shape, adapter=adapter, bf16=bf16))
