"""Sampling with real models: our loop against `model.generate` and against itself under other batchings."""

from dataclasses import replace

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from online_dpo.modeling.memory import DoesNotFit
from online_dpo.packing.pack import pack_groups
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams
from support import tiny

KEY = RolloutKey(seed=3, step=5)
PARAMS = SamplingParams(max_new_tokens=14, end_token_ids=(tiny.EOS, tiny.END, 9, 17))
LENGTHS = (3, 11, 1, 7, 5)


def engine(model, batch_size=64):
    return TransformersEngine(model, tiny.tokenizer(), batch_size, version=5)


def tried(model):
    """An engine that has found out already whether its decoder is right for the model."""
    ready = engine(model)
    ready.generate(tiny.prompts([1]), 1, PARAMS, KEY)
    return ready


def ids_of(groups):
    return [[c.token_ids for c in g.completions] for g in groups]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_our_loop_equals_generate_token_for_token(family):
    model = tiny.causal_lm(family)
    ours = engine(model).generate(tiny.prompts(LENGTHS), 3, PARAMS, KEY)
    through_generate = replace(PARAMS, extra={"no_repeat_ngram_size": 0})
    theirs = engine(model).generate(tiny.prompts(LENGTHS), 3, through_generate, KEY)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.completions, other.completions, strict=True):
            assert (a.token_ids, a.finish_reason, a.text) == (b.token_ids, b.finish_reason, b.text)
            assert a.logprobs == pytest.approx(b.logprobs, abs=2e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sampler_logprobs_equal_those_of_the_training_forward(family):
    model = tiny.causal_lm(family)
    groups = engine(model).generate(tiny.prompts(LENGTHS), 2, PARAMS, KEY)
    enable_logprobs(model)
    with torch.no_grad():
        logps = row_logprobs(model, pack_groups(groups, [], shared=True)).token_logps_M
    assert logps.tolist() == pytest.approx([x for g in groups for c in g.completions for x in c.logprobs], abs=2e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_what_is_sampled_does_not_depend_on_the_batching_or_order(batch_size):
    model, prompts = tiny.causal_lm(), tiny.prompts(LENGTHS)
    expected = ids_of(engine(model).generate(prompts, 3, PARAMS, KEY))
    reversed_order = engine(model, batch_size).generate(prompts[::-1], 3, PARAMS, KEY)[::-1]
    assert ids_of(reversed_order) == expected
    assert [g.prompt for g in reversed_order] == prompts


def test_more_completions_begin_with_the_fewer():
    model, prompts = tiny.causal_lm(), tiny.prompts(LENGTHS)
    two, five = (ids_of(engine(model).generate(prompts, k, PARAMS, KEY)) for k in (2, 5))
    assert two == [group[:2] for group in five]
    assert all(len(set(group)) > 1 for group in five)


def test_completions_end_with_the_first_end_token_and_say_why():
    groups = engine(tiny.causal_lm(sharpness=1.0)).generate(tiny.prompts([4] * 12), 4, PARAMS, KEY)
    reasons = set()
    for completion in (c for g in groups for c in g.completions):
        reasons.add(completion.finish_reason)
        assert not set(completion.token_ids[:-1]) & set(PARAMS.end_token_ids)
        assert (completion.token_ids[-1] in PARAMS.end_token_ids) == (completion.finish_reason == "stop")
        assert len(completion.token_ids) == 14 or completion.finish_reason == "stop"
        assert len(completion.logprobs) == len(completion.token_ids) and completion.policy_version == 5
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("extra", [{}, {"no_repeat_ngram_size": 0}])
def test_stop_strings_end_a_completion(extra):
    params = replace(PARAMS, stop_strings=("w7", "w20"), extra=extra, end_token_ids=(tiny.EOS,), max_new_tokens=30)
    groups = engine(tiny.causal_lm(sharpness=1.0)).generate(tiny.prompts([4] * 8), 2, params, KEY)
    completions = [c for g in groups for c in g.completions]
    stopped = [c for c in completions if c.token_ids[-1] != tiny.EOS and c.finish_reason == "stop"]
    assert stopped
    for completion in completions:
        words = completion.text.split()
        assert not {"w7", "w20"} & set(words[:-1])
        if completion in stopped:
            assert words[-1] in {"w7", "w20"}


def test_repetition_penalty_looks_at_the_prompt_and_not_at_padding():
    model = tiny.causal_lm()
    params = replace(PARAMS, repetition_penalty=1.8)
    together = engine(model).generate(tiny.prompts(LENGTHS), 2, params, KEY)
    alone = [engine(model).generate([p], 2, params, KEY)[0] for p in tiny.prompts(LENGTHS)]
    assert ids_of(together) == ids_of(alone)
    assert ids_of(together) != ids_of(engine(model).generate(tiny.prompts(LENGTHS), 2, PARAMS, KEY))


def test_a_models_own_generation_config_changes_neither_way_of_sampling():
    model = tiny.causal_lm()
    expected = ids_of(engine(model).generate(tiny.prompts(LENGTHS), 2, PARAMS, KEY))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = list(range(4, 20))
    for extra in ({}, {"no_repeat_ngram_size": 0}):
        assert ids_of(engine(model).generate(tiny.prompts(LENGTHS), 2, replace(PARAMS, extra=extra), KEY)) == expected
    assert model.generation_config.repetition_penalty == 5.0


def test_generation_kwargs_reach_generate():
    params = replace(PARAMS, extra={"suppress_tokens": list(range(4, 30))})
    groups = engine(tiny.causal_lm(sharpness=1.0)).generate(tiny.prompts(LENGTHS), 4, params, KEY)
    tokens = {t for g in groups for c in g.completions for t in c.token_ids}
    assert tokens and not tokens & set(range(4, 30))


def test_static_cache_samples_the_same():
    model = tiny.causal_lm()
    expected = ids_of(engine(model).generate(tiny.prompts(LENGTHS), 2, PARAMS, KEY))
    static = replace(PARAMS, extra={"cache_implementation": "static"})
    assert ids_of(engine(model).generate(tiny.prompts(LENGTHS), 2, static, KEY)) == expected


def test_a_model_with_recurrent_state_goes_through_generate():
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=1)).eval()
    [group] = engine(model).generate(tiny.prompts([6]), 2, PARAMS, KEY)
    assert len(group.completions) == 2
    with torch.no_grad():
        for row, completion in enumerate(group.completions):
            ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
            logps = model(ids).logits.log_softmax(-1)[0, len(group.prompt.token_ids) - 1 : -1]
            expected = logps.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0].tolist()
            assert completion.logprobs == pytest.approx(expected, abs=1e-4), row


def test_global_random_state_mode_and_configs_are_left_alone():
    model = tiny.causal_lm().train()
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    for params in (PARAMS, replace(PARAMS, extra={"no_repeat_ngram_size": 0})):
        engine(model).generate(tiny.prompts(LENGTHS), 2, params, KEY)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation


def test_kv_cache_is_on_with_gradient_checkpointing():
    """One token a step, and the same completions: layers that drop the cache would see that token alone."""
    params = replace(PARAMS, end_token_ids=(tiny.EOS,))
    expected = ids_of(engine(tiny.causal_lm()).generate(tiny.prompts([6, 6]), 2, params, KEY))
    model = tiny.causal_lm()
    tiny.checkpoint_layers(model)
    model.train()
    ready, seen = tried(model), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert ids_of(ready.generate(tiny.prompts([6, 6]), 2, params, KEY)) == expected
    assert seen[0] == 6 and set(seen[1:]) == {1} and len(seen) == 14


def test_prompt_is_prefilled_once_and_finished_rows_leave_the_batch():
    model = tiny.causal_lm(sharpness=1.0)
    ready, sizes = tried(model), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    ends = tuple(range(1, 20))
    ready.generate(tiny.prompts([4, 5, 6]), 4, replace(PARAMS, end_token_ids=ends), KEY)
    assert sizes[0] == 3 and sizes[1] <= 12 and sizes[-1] < 4
    assert sizes[1:] == sorted(sizes[1:], reverse=True)


def test_running_out_of_memory_halves_the_batch_and_samples_the_same():
    model, prompts = tiny.causal_lm(), tiny.prompts(LENGTHS)
    expected = ids_of(engine(model).generate(prompts, 2, PARAMS, KEY))

    def memory_for_four(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 4:
            raise torch.OutOfMemoryError("no room")

    model.model.register_forward_pre_hook(memory_for_four, with_kwargs=True)
    small = engine(model)
    assert ids_of(small.generate(prompts, 2, PARAMS, KEY)) == expected
    assert small.batch_size <= 4
    model.model.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError):
        small.generate(prompts, 2, PARAMS, KEY)


def test_the_trial_makes_do_with_less_memory():
    """Its two prompts do not fit together, so the longest is tried alone; the samples are the same."""
    model, prompts = tiny.causal_lm(), tiny.prompts(LENGTHS)
    expected = ids_of(engine(model).generate(prompts, 2, PARAMS, KEY))

    def memory_for_two(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model.model.register_forward_pre_hook(memory_for_two, with_kwargs=True)
    small = TransformersEngine(model, tiny.tokenizer(), batch_size=4)
    assert ids_of(small.generate(prompts, 2, PARAMS, KEY)) == expected
    assert small._path == "dynamic" and small.batch_size == 2
    model.model.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(DoesNotFit, match="2 completions of one prompt do not fit in memory. Lower `num_completions`"):
        TransformersEngine(model, tiny.tokenizer()).generate(prompts, 2, PARAMS, KEY)


def test_further_samples_are_those_that_come_next():
    model, prompts = tiny.causal_lm(), tiny.prompts(LENGTHS)
    six = ids_of(engine(model).generate(prompts, 6, PARAMS, KEY))
    two = ids_of(engine(model).generate(prompts[1:3], 2, PARAMS, replace(KEY, first_sample=4)))
    assert two == [group[4:] for group in six[1:3]] and two != [group[:2] for group in six[1:3]]


def test_no_prompts_give_no_groups():
    assert engine(tiny.causal_lm()).generate([], 2, PARAMS, KEY) == []
