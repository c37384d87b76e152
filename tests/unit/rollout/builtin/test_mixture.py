"""Sampling from the mixture of policy and reference, against the mixed distribution worked out with full forwards."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM

from online_dpo.modeling.reference import AdapterOffReference, FrozenReference
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.builtin.mixture import MixtureEngine
from online_dpo.rollout.builtin.random_numbers import uniform_numbers
from online_dpo.rollout.builtin.sampling import draw_tokens, reshape_logits
from online_dpo.rollout.opponent import ModelOpponent
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.types import Prompt
from support import tiny

KEY = RolloutKey(seed=3, step=5, stream=5)
PARAMS = SamplingParams(max_new_tokens=12, end_token_ids=(tiny.EOS, tiny.END, 9, 17))
LENGTHS = (3, 11, 1, 7, 5)
FAMILIES = ["llama", "gpt2", "gemma2", "mistral"]
SETTINGS = [dict(temperature=0.7, top_k=9), dict(top_p=0.8, min_p=0.05)]
"""How the mixed distribution is reshaped once both models have been asked: the same for each family."""


def two_models(family):
    policy = tiny.causal_lm(family)
    return policy, FrozenReference(tiny.causal_lm(family, seed=5), "another model")


def with_adapter(family):
    torch.manual_seed(3)
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    policy = get_peft_model(tiny.causal_lm(family), settings).eval()
    return policy, AdapterOffReference(policy)


def mixed_logprobs(policy, reference, ids, share):
    """log(pi^(1 - share) ref^share / norm) of the next token, from the definition."""
    ids_1T = torch.tensor([ids])
    with torch.no_grad():
        own_V = policy(ids_1T).logits[0, -1].double().log_softmax(-1)
        with reference.active() as other:
            other_V = other(ids_1T).logits[0, -1].double().log_softmax(-1)
    product_V = own_V.exp() ** (1 - share) * other_V.exp() ** share
    return (product_V / product_V.sum()).log(), own_V, other_V


def by_brute_force(policy, reference, prompt, share, params):
    ids, logprobs, distance = [], [], 0.0
    numbers = uniform_numbers(KEY, prompt.row, 0, params.max_new_tokens)
    for number in numbers:
        before = [*prompt.token_ids, *ids]
        mixed_V, own_V, other_V = mixed_logprobs(policy, reference, before, share)
        seen_1V = torch.zeros(1, len(mixed_V), dtype=torch.bool)
        seen_1V[0, before] = True
        shaped_1V = reshape_logits(mixed_V[None].float(), params, seen_1V)
        token = int(draw_tokens(shaped_1V, torch.tensor([number]))[0])
        ids.append(token)
        logprobs.append(float(mixed_V[token]))
        distance += float((mixed_V.exp() - own_V.exp()).abs().sum() * (mixed_V.exp() - other_V.exp()).abs().sum())
        if token in params.end_token_ids:
            break
    return tuple(ids), logprobs, distance


@pytest.mark.parametrize("models", [two_models, with_adapter])
@pytest.mark.parametrize(
    ("family", "changes"), [*((f, {}) for f in FAMILIES), *(("llama", c) for c in SETTINGS)], ids=str
)
def test_tokens_and_logprobs_are_those_of_the_mixed_distribution(family, models, changes):
    policy, reference = models(family)
    params = replace(PARAMS, **changes)
    engine = MixtureEngine(policy, reference.active, lambda: 0.3, tiny.tokenizer())
    prompts, apart = tiny.prompts(LENGTHS), 0.0
    for group in engine.generate(prompts, 1, params, KEY):
        [completion] = group.completions
        ids, logprobs, distance = by_brute_force(policy, reference, group.prompt, 0.3, params)
        assert completion.token_ids == ids
        assert completion.logprobs == pytest.approx(logprobs, abs=5e-5)
        apart += distance
    assert apart > 0.5  # the mixture is neither of the two


def test_how_often_a_token_is_sampled_is_its_probability():
    policy, reference = two_models("llama")
    engine = MixtureEngine(policy, reference.active, lambda: 0.6, tiny.tokenizer(), batch_size=500)
    [prompt] = tiny.prompts([6])
    many = [Prompt(prompt.content, prompt.token_ids, row) for row in range(4000)]
    groups = engine.generate(many, 1, replace(PARAMS, max_new_tokens=1), KEY)
    counts_V = torch.bincount(torch.tensor([g.completions[0].token_ids[0] for g in groups]), minlength=tiny.VOCABULARY)
    p_V = mixed_logprobs(policy, reference, prompt.token_ids, 0.6)[0].exp()
    off_V = (counts_V - 4000 * p_V).abs() / (4000 * p_V * (1 - p_V) + 1).sqrt()
    assert off_V.max() < 4


@pytest.mark.parametrize("models", [two_models, with_adapter])
def test_without_a_share_it_is_the_policy_and_with_the_whole_the_reference(models):
    policy, reference = models("llama")
    prompts = tiny.prompts(LENGTHS)

    def ids(engine):
        return [g.completions[0].token_ids for g in engine.generate(prompts, 1, PARAMS, KEY)]

    own = ids(TransformersEngine(policy, tiny.tokenizer()))
    with reference.active() as model:
        other = ids(TransformersEngine(model, tiny.tokenizer()))
    mixtures = [ids(MixtureEngine(policy, reference.active, lambda m=m: m, tiny.tokenizer())) for m in (0.0, 1.0, 0.5)]
    assert mixtures[:2] == [own, other] and mixtures[2] not in (own, other)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_sampled_does_not_depend_on_the_batching(batch_size):
    policy, reference = two_models("llama")
    prompts = tiny.prompts(LENGTHS)
    whole, cut = (
        MixtureEngine(policy, reference.active, lambda: 0.4, tiny.tokenizer(), size).generate(prompts, 3, PARAMS, KEY)
        for size in (64, batch_size)
    )
    assert [[c.token_ids for c in g.completions] for g in whole] == [[c.token_ids for c in g.completions] for g in cut]


def test_the_policy_is_left_as_it_was():
    policy, reference = with_adapter("llama")
    policy.train()
    ids = torch.arange(4, 12)[None]
    before = policy(ids).logits
    MixtureEngine(policy, reference.active, lambda: 0.4, tiny.tokenizer()).generate(tiny.prompts([3]), 1, PARAMS, KEY)
    assert policy.training and torch.equal(policy(ids).logits, before)


def test_completions_are_signed(tmp_path):
    policy, reference = two_models("llama")
    opponent = ModelOpponent(MixtureEngine(policy, reference.active, lambda: 0.4, tiny.tokenizer()), "mixture")
    [group] = opponent.answer(tiny.prompts([3]), PARAMS, KEY)
    assert [c.author for c in group.completions] == ["mixture"]


def test_models_that_cannot_be_mixed_are_refused():
    policy = tiny.causal_lm()
    larger = FrozenReference(tiny.causal_lm(vocab_size=tiny.VOCABULARY + 5), "larger")
    with pytest.raises(ValueError, match=f"predicts {tiny.VOCABULARY} tokens and the reference {tiny.VOCABULARY + 5}"):
        MixtureEngine(policy, larger.active, lambda: 0.5, tiny.tokenizer())
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match="full or sliding-window attention"):
        MixtureEngine(recurrent, FrozenReference(recurrent, "itself").active, lambda: 0.5, tiny.tokenizer())


def test_a_model_whose_decoding_is_wrong_ends_the_run_with_the_cause(caplog, monkeypatch):
    policy, reference = two_models("llama")
    engine = MixtureEngine(policy, reference.active, lambda: 0.4, tiny.tokenizer())
    monkeypatch.setattr("online_dpo.rollout.builtin.engine.MOST_ROUNDING", -1.0)  # nothing is exact enough
    with pytest.raises(ValueError, match="cannot be sampled with this model"):
        engine.generate(tiny.prompts([3]), 1, PARAMS, KEY)
    assert "log-probabilities differ by" in caplog.text
