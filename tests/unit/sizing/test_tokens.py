"""The estimate of a pass, against whole passes of models of real size: fake tensors have sizes and no content."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from online_dpo.packing.pack import pack_pairs
from online_dpo.sizing import passing
from online_dpo.sizing.plan import Plan
from online_dpo.sizing.shape import MODELS, shape_of
from online_dpo.sizing.tokens import SHARE, STEP, pass_bytes, shape_like, tokens_that_fit
from online_dpo.training.pass_size import fields_of
from online_dpo.types import Pair
from support import tiny

GIB = 2**30


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at a time that were made inside."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def freed(self, address, size):
        self.known.discard(address)
        self.now -= size


def measured(shape, pairs, gradient_checkpointing):
    """The peak of a pass that has gradients of another one beside it, without these; tokens and width of its rows."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32768,
    )
    group = tiny.group(tiny.prompts([200])[0], [[7] * 300, [7] * 300])
    rows = pack_pairs([Pair(replace(group, prompt=replace(group.prompt, row=i)), 0, 1) for i in range(pairs)], True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Qwen2ForCausalLM(config).train()
        enable_logprobs(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with Peak() as peak:
            with torch.autocast("cpu", torch.bfloat16):
                logprobs = row_logprobs(model, rows)
            logprobs.logps_S.sum().backward()
    return peak.most, rows.tokens.ids_RT.numel(), rows.tokens.ids_RT.shape[1]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("vocabulary", [8192, slow(151936)])  # many small chunks of the head take their time
@pytest.mark.parametrize("name", ["0.5B", slow("1.5B")])
def test_a_pass_of_a_model_of_real_size(monkeypatch, name, vocabulary, checkpointing):
    monkeypatch.setattr(passing, "CHUNK_LOGITS", passing.CHUNK_LOGITS_ON_CPU)  # what the head has at a time here
    shape = replace(MODELS[name], vocabulary=vocabulary)
    peak, tokens, width = measured(shape, 20, checkpointing)
    assert (tokens, width) == (16_000, 800)
    estimate = pass_bytes(Plan(shape, tokens_per_pass=tokens, gradient_checkpointing=checkpointing), width)
    print(f"{name}: {estimate / GIB:.2f} GiB estimated, {peak / GIB:.2f} found")
    assert 0.9 * peak < estimate < (1.2 if checkpointing else 1.06) * peak


@pytest.mark.parametrize(("name", "most"), [("0.5B", 31e9), ("1.5B", 64e9)])
def test_the_default_of_16384_tokens_without_checkpointing_is_more_than_many_cards_have(name, most):
    plan = Plan(MODELS[name], tokens_per_pass=16384, gradient_checkpointing=False)
    size = pass_bytes(plan, 1024)
    assert 0.9 * most < size < 1.05 * most
    held = 18 * MODELS[name].parameters
    free = 80e9 - held
    tokens = tokens_that_fit(plan, int(free), 1024, 1.0, 16384)
    assert (tokens == 16384) == (name == "0.5B")
    assert pass_bytes(replace(plan, tokens_per_pass=tokens), 1024) <= SHARE * free
    assert tokens == 16384 or pass_bytes(replace(plan, tokens_per_pass=tokens + STEP), 1024) > SHARE * free


def test_tokens_grow_with_what_is_free_and_shrink_with_padding():
    plan = Plan(MODELS["1.5B"], gradient_checkpointing=False)
    found = [tokens_that_fit(plan, size * GIB, 800, 1.0, 16384) for size in (0, 8, 12, 24, 48, 200)]
    assert found == sorted(found) and found[0] == STEP and found[-1] == 16384 and len(set(found)) == 6
    assert all(tokens % STEP == 0 for tokens in found)
    padded = tokens_that_fit(plan, 24 * GIB, 800, 1.5, 16384)
    assert found[3] / 1.6 < padded < found[3] / 1.4
    assert tokens_that_fit(plan, 200 * GIB, 800, 1.0, 1000) == 1000, "the most that was asked for"
    assert tokens_that_fit(replace(plan, gradient_checkpointing=True), 24 * GIB, 800, 1.0, 16384) == 16384
    sharded = tokens_that_fit(replace(plan, sharding="fsdp2", gpus=8), 24 * GIB, 800, 1.0, 16384)
    assert sharded != found[3], "what is gathered for a pass, and hidden states in half precision"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_models_of_other_kinds_have_a_shape_of_as_many_weights(family):
    model = tiny.causal_lm(family)
    parameters = sum(p.numel() for p in model.parameters())
    config = model.config.get_text_config()
    shape = shape_like(fields_of(model), parameters)
    assert (shape.hidden, shape.layers) == (config.hidden_size, config.num_hidden_layers)
    if config.model_type in ("llama", "qwen2", "qwen3", "mistral"):
        assert shape == shape_of(config.to_dict())
    assert pass_bytes(Plan(shape, tokens_per_pass=64), 64) > 0


def test_one_that_is_taken_for_another_kind_has_its_shape():
    shape = MODELS["7B"]
    fields = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
    like = shape_like({"model_type": "new", "vocab_size": 152064, **fields}, shape.parameters)
    assert like.intermediate == pytest.approx(shape.intermediate, rel=0.001)
    plan = Plan(shape, gradient_checkpointing=False)
    assert pass_bytes(replace(plan, policy=like), 800) == pytest.approx(pass_bytes(plan, 800), rel=0.01)
