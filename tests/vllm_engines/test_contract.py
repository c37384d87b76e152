"""What every engine promises, asked of each: transformers, vLLM in process, a vLLM server."""

from dataclasses import replace

import pytest
import torch

from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams
from support import tiny, vllm_tools

KEY = RolloutKey(seed=3, step=5)
PARAMS = SamplingParams(max_new_tokens=14, end_token_ids=(tiny.EOS, tiny.END, 9, 17))
LENGTHS = (3, 40, 1, 7, 70)


def ids_of(groups):
    return [[c.token_ids for c in g.completions] for g in groups]


def completions_of(groups):
    return [c for g in groups for c in g.completions]


def test_groups_come_in_the_order_of_the_prompts_with_k_completions_and_the_version(setting):
    prompts = tiny.prompts(LENGTHS)
    groups = setting.use(vllm_tools.policy(setting.family)).generate(prompts, 3, PARAMS, KEY)
    assert [g.prompt for g in groups] == prompts
    for group in groups:
        assert len(group.completions) == 3
        assert {c.policy_version for c in group.completions} == {setting.version}
        for completion in group.completions:
            assert len(completion.logprobs) == len(completion.token_ids) >= 1
            joint = tiny.tokenizer().decode([*group.prompt.token_ids, *completion.token_ids], skip_special_tokens=True)
            assert completion.text == joint.removeprefix(group.prompt.content)


def test_completions_end_with_the_first_of_exactly_the_given_end_tokens_and_say_why(setting):
    """The tokenizer's and the model's own end token is not among them, so it ends nothing."""
    params = replace(PARAMS, end_token_ids=(9, 17, tiny.END))
    model = vllm_tools.policy(setting.family, sharpness=1.0)
    groups = setting.use(model).generate(tiny.prompts([4] * 12), 8, params, KEY)
    reasons, middle = set(), set()
    for completion in completions_of(groups):
        reasons.add(completion.finish_reason)
        middle |= set(completion.token_ids[:-1])
        assert (completion.token_ids[-1] in params.end_token_ids) == (completion.finish_reason == "stop")
        assert len(completion.token_ids) == 14 or completion.finish_reason == "stop"
    assert reasons == {"stop", "length"}
    assert not middle & set(params.end_token_ids) and tiny.EOS in middle


def test_stop_strings_end_a_completion_and_stay_in_it(setting):
    params = replace(PARAMS, stop_strings=("w7", "w20"), end_token_ids=(tiny.EOS,))
    model = vllm_tools.policy(setting.family, sharpness=1.0)
    groups = setting.use(model).generate(tiny.prompts([4] * 12), 4, params, KEY)
    stopped = 0
    for completion in completions_of(groups):
        words = completion.text.split()
        assert not {"w7", "w20"} & set(words[:-1])
        if completion.finish_reason == "stop" and completion.token_ids[-1] != tiny.EOS:
            stopped += 1
            assert words[-1] in {"w7", "w20"}
    assert stopped
    assert vllm_tools.largest_error(model, groups) < 1e-4


def test_the_same_key_samples_the_same_and_every_part_of_it_counts(setting):
    prompts = tiny.prompts(LENGTHS)
    engine = setting.use(vllm_tools.policy(setting.family))
    first = ids_of(engine.generate(prompts, 3, PARAMS, KEY))
    assert ids_of(engine.generate(prompts, 3, PARAMS, KEY)) == first
    for other in (replace(KEY, seed=4), replace(KEY, step=6), replace(KEY, stream=1)):
        assert ids_of(engine.generate(prompts, 3, PARAMS, other)) != first
    rows = [replace(prompt, row=prompt.row + 50) for prompt in prompts]
    assert ids_of(engine.generate(rows, 3, PARAMS, KEY)) != first


def test_what_is_sampled_does_not_depend_on_order_company_or_k(setting):
    prompts = tiny.prompts(LENGTHS)
    engine = setting.use(vllm_tools.policy(setting.family))
    five = ids_of(engine.generate(prompts, 5, PARAMS, KEY))
    two = ids_of(engine.generate(prompts[::-1], 2, PARAMS, KEY))[::-1]
    alone = [ids_of(engine.generate([prompt], 2, PARAMS, KEY))[0] for prompt in prompts]
    assert two == alone == [group[:2] for group in five]
    assert all(len(set(group)) > 1 for group in five)


def test_one_token_completions(setting):
    model = vllm_tools.policy(setting.family, sharpness=1.0)
    groups = setting.use(model).generate(tiny.prompts([4] * 20), 4, replace(PARAMS, max_new_tokens=1), KEY)
    for completion in completions_of(groups):
        assert len(completion.token_ids) == 1
        assert (completion.finish_reason == "stop") == (completion.token_ids[0] in PARAMS.end_token_ids)
    assert {c.finish_reason for c in completions_of(groups)} == {"stop", "length"}
    assert vllm_tools.largest_error(model, groups) < 1e-4


def test_a_prompt_at_the_length_limit_has_room_for_its_whole_completion(setting):
    model = vllm_tools.policy(setting.family)
    params = replace(PARAMS, end_token_ids=(tiny.PAD,))
    prompts = tiny.prompts([vllm_tools.MAX_LENGTH - PARAMS.max_new_tokens] * 2)
    groups = setting.use(model).generate(prompts, 3, params, KEY)
    assert 14 in {len(c.token_ids) for c in completions_of(groups)}
    assert vllm_tools.largest_error(model, groups) < 1e-4


def test_logprobs_are_the_models_own_whatever_reshapes_the_distribution(setting):
    model = vllm_tools.policy(setting.family)
    engine = setting.use(model)
    for change in (
        {},
        {"temperature": 0.5},
        {"top_p": 0.7},
        {"top_k": 5},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
    ):
        groups = engine.generate(tiny.prompts(LENGTHS), 2, replace(PARAMS, **change), KEY)
        assert vllm_tools.largest_error(model, groups) < 1e-4, change


def test_top_1_takes_the_most_probable_token(setting):
    model = vllm_tools.policy(setting.family)
    groups = setting.use(model).generate(tiny.prompts(LENGTHS), 2, replace(PARAMS, top_k=1), KEY)
    with torch.no_grad():
        for group in groups:
            assert group.completions[0].token_ids == group.completions[1].token_ids
            answer = group.completions[0].token_ids
            logits = model(torch.tensor([[*group.prompt.token_ids, *answer]])).logits[0]
            assert tuple(logits.argmax(-1)[len(group.prompt.token_ids) - 1 : -1].tolist()) == answer


def test_repetition_penalty_looks_at_prompt_and_completion_as_with_transformers(setting):
    model = vllm_tools.policy(setting.family)
    engine, reference = setting.use(model), TransformersEngine(model, tiny.tokenizer())
    reference.sync(model, 0)
    params = replace(PARAMS, top_k=1, repetition_penalty=3.0, end_token_ids=(tiny.PAD,))
    ours, theirs = (e.generate(tiny.prompts(LENGTHS), 2, params, KEY) for e in (engine, reference))
    assert ids_of(ours) == ids_of(theirs)
    without = engine.generate(tiny.prompts(LENGTHS), 2, replace(params, repetition_penalty=1.0), KEY)
    assert ids_of(ours) != ids_of(without)


def test_a_low_temperature_favours_probable_tokens(setting):
    engine = setting.use(vllm_tools.policy(setting.family))

    def mean_logprob(temperature):
        params = replace(PARAMS, temperature=temperature, end_token_ids=(tiny.PAD,))
        groups = engine.generate(tiny.prompts([5] * 20), 4, params, KEY)
        return torch.tensor([x for c in completions_of(groups) for x in c.logprobs]).mean()

    assert mean_logprob(0.3) > mean_logprob(1.0) + 0.5


def test_options_that_vllm_names_otherwise(setting):
    params = replace(
        PARAMS, end_token_ids=tuple(range(1, 20)), extra={"min_new_tokens": 6, "suppress_tokens": list(range(20, 30))}
    )
    model = vllm_tools.policy(setting.family, sharpness=1.0)
    groups = setting.use(model).generate(tiny.prompts(LENGTHS), 4, params, KEY)
    assert min(len(c.token_ids) for c in completions_of(groups)) >= 6
    assert not {t for c in completions_of(groups) for t in c.token_ids} & set(range(20, 30))
    assert vllm_tools.largest_error(model, groups) < 1e-4


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_after_an_optimizer_step_and_sync_samples_come_from_the_new_weights(setting, adapter):
    """The prompts are the same, so keys and values of the old weights wait in the prefix cache; and a tied output head
    must follow its embedding.
    """
    make = vllm_tools.lora_policy if adapter else vllm_tools.policy
    model, prompts = make(setting.family), tiny.prompts(LENGTHS)
    before = setting.use(model).generate(prompts, 3, PARAMS, KEY)
    assert vllm_tools.largest_error(model, before) < 1e-4
    for step in range(2):
        vllm_tools.change_weights(model, step, only_trainable=adapter)
        assert vllm_tools.largest_error(model, before) > 0.05
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        after = setting.use(model).generate(prompts, 3, PARAMS, KEY)
        assert vllm_tools.largest_error(model, after) < 1e-4
        assert {c.policy_version for c in completions_of(after)} == {setting.version}
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_weights_that_are_not_synced_are_not_sampled_from(setting):
    if setting.kind == "transformers":
        pytest.skip("it samples from the live model")
    model, prompts = vllm_tools.policy(setting.family), tiny.prompts(LENGTHS)
    engine = setting.use(model)
    before = engine.generate(prompts, 2, PARAMS, KEY)
    vllm_tools.change_weights(model, 0)
    assert engine.generate(prompts, 2, PARAMS, KEY) == before


def test_sync_of_the_same_version_changes_nothing(setting):
    model, prompts = vllm_tools.policy(setting.family), tiny.prompts(LENGTHS)
    engine = setting.use(model)
    before = engine.generate(prompts, 2, PARAMS, KEY)
    engine.sync(model, setting.version)
    assert engine.generate(prompts, 2, PARAMS, KEY) == before


def test_no_prompts_give_no_groups(setting):
    assert setting.use(vllm_tools.policy(setting.family)).generate([], 2, PARAMS, KEY) == []


def test_global_random_state_is_left_alone(setting):
    model = vllm_tools.policy(setting.family)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    setting.use(model).generate(tiny.prompts(LENGTHS), 2, PARAMS, KEY)
    assert torch.equal(torch.get_rng_state(), state)
