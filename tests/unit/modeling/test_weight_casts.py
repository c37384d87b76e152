"""Each weight is cast once a call, wherever frozen models compute under autocast, and nothing else changes."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForSequenceClassification

from online_dpo.modeling.borrowing import adapter_off
from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from online_dpo.modeling.weight_casts import weights_cast_once
from online_dpo.packing.pack import pack_groups
from online_dpo.rollout.builtin.engine import DYNAMIC, GENERATE, TransformersEngine
from online_dpo.rollout.builtin.mixture import MixtureEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.scoring.rewards.model import RewardModelScorer
from support import tiny
from support.training import LORA
from support.weight_casts import WeightCasts

PARAMS = SamplingParams(max_new_tokens=12, end_token_ids=(tiny.EOS,))
KEY = RolloutKey(seed=3, step=5)
BF16 = torch.autocast("cpu", torch.bfloat16)


def sample(engine, k=2):
    return [
        (c.token_ids, c.logprobs)
        for g in engine.generate(tiny.prompts((3, 5, 9)), k, PARAMS, KEY)
        for c in g.completions
    ]


def frozen(model):
    return model.requires_grad_(False)


def classifier(labels=1):
    torch.manual_seed(0)
    return frozen(LlamaForSequenceClassification(tiny.config("llama", num_labels=labels)).eval())


@pytest.mark.parametrize("path", [DYNAMIC, GENERATE])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_frozen_model_is_cast_once_a_call_of_the_sampler(family, path):
    model = frozen(tiny.causal_lm(family))
    engine = TransformersEngine(model, tiny.tokenizer(), batch_size=64)
    engine._path = path
    with BF16:
        first = sample(engine)
        with WeightCasts(model) as casts:
            assert sample(engine) == first
    assert len(casts.counts) >= 15 and set(casts.counts.values()) == {1}, "12 times each before"


@pytest.mark.parametrize("lora", [False, True])
def test_policy_and_reference_of_a_mixture_are_cast_once_a_call(lora):
    policy = frozen(tiny.causal_lm())
    if lora:
        policy = reference = get_peft_model(policy, LoraConfig(**LORA))
    else:
        reference = frozen(tiny.causal_lm(seed=1))

    def context():
        return adapter_off(policy) if lora else nullcontext(reference)

    engine = MixtureEngine(policy, context, lambda: 0.3, tiny.tokenizer())
    with BF16:
        first = sample(engine)
        with WeightCasts(policy, *([] if lora else [reference])) as casts:
            assert sample(engine) == first
    assert len(casts.counts) == (23 if lora else 30) and set(casts.counts.values()) == {1}


def test_reward_models_and_pairwise_judges_are_cast_once_a_call():
    groups = [tiny.group(p, [[5, 6, 7, 1], [8, 9, 1]]) for p in tiny.prompts((5, 9, 7, 4))]
    model = classifier()
    scorer = RewardModelScorer(model, tiny.tokenizer(), batch_size=2, share_prompts=False)
    judge = PairwiseModelJudge(model, tiny.tokenizer(), template="{prompt} {first} <end> {second}", batch_size=2)
    for ask in (scorer.score, judge.prefer):
        with BF16, WeightCasts(model) as casts:
            answers = ask(groups)
        assert set(casts.counts.values()) == {1}
        model.requires_grad_(True)  # as autocast caches these
        with BF16:
            assert ask(groups) == answers
        model.requires_grad_(False)


def test_a_head_with_code_of_its_own_is_cast_once_for_all_chunks(monkeypatch):
    model = frozen(tiny.causal_lm("gemma2"))
    enable_logprobs(model)
    rows = pack_groups([tiny.group(p, [[5, 6, 7, 1], [8, 9, 1]]) for p in tiny.prompts((5, 9))], [], shared=False)
    monkeypatch.setattr("online_dpo.modeling.logprobs.chunk_size", lambda *_: 3)
    with BF16, torch.no_grad():
        row_logprobs(model, rows)  # the first call finds out what kind of head it is
        with WeightCasts(model) as casts:
            row_logprobs(model, rows)
    assert set(casts.counts.values()) == {1}


def test_results_are_the_same_bit_for_bit_and_nothing_is_left_behind():
    model = frozen(tiny.causal_lm("gpt_neox"))
    model.gpt_neox.layers[0].requires_grad_(True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    ids = torch.arange(4, 12)[None]
    with BF16, torch.no_grad():
        plain = model(ids).logits
        with weights_cast_once(model):
            assert torch.equal(model(ids).logits, plain)
            assert not model(ids).logits.requires_grad
        with pytest.raises(RuntimeError, match="stop"), weights_cast_once(model):
            raise RuntimeError("stop")
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert not torch.equal(model(ids).logits, plain), "no copy of the old weights is in use"
    with weights_cast_once(model):  # without autocast it does nothing, also to gradients
        assert model(ids).logits.requires_grad


def test_layer_norms_in_half_precision_are_cast_up_once_on_a_gpu():
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # `torch.autocast` turns itself off without a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad():
            options = dict(device="cuda", dtype=torch.bfloat16)
            model = frozen(nn.Sequential(nn.LayerNorm(8, **options), nn.LayerNorm(8, bias=False, **options)))
            x = torch.empty(2, 8, **options)
            with WeightCasts(model) as as_it_is:
                for _ in range(3):
                    expected = model(x)
            with weights_cast_once(model), WeightCasts(model) as casts:
                for _ in range(3):
                    found = model(x)
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    assert sum(as_it_is.counts.values()) == 9 and not casts.counts
    assert found.dtype == expected.dtype == torch.float32 and found.device == expected.device
    assert all("forward" not in vars(module) for module in model.modules())
