"""What is asked of vLLM and read from its answers. Needs no vLLM."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.vllm.requests import (
    Sampled,
    build_groups,
    build_requests,
    completion_seed,
    from_output,
    from_response,
    vllm_sampling,
)
from support import tiny

KEY = RolloutKey(seed=3, step=5)
PARAMS = SamplingParams(max_new_tokens=14, end_token_ids=(1, 2))


def test_every_option_is_given_so_that_no_default_takes_part():
    params = replace(
        PARAMS, temperature=0.7, top_p=0.8, top_k=4, min_p=0.1, repetition_penalty=1.2, stop_strings=("\n\n",)
    )
    assert vllm_sampling(params) == {
        "n": 1,
        "max_tokens": 14,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": ["\n\n"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "logprobs": 0,
        "skip_special_tokens": True,
    }
    assert vllm_sampling(PARAMS)["min_p"] == 0.0


def test_options_of_generation_config_that_vllm_names_otherwise():
    extra = {"min_new_tokens": 3, "bad_words": ["no"], "suppress_tokens": [7, 8]}
    options = vllm_sampling(replace(PARAMS, extra=extra))
    assert options["min_tokens"] == 3 and options["bad_words"] == ["no"]
    assert options["logit_bias"] == {7: -100.0, 8: -100.0}
    assert "logit_bias" not in vllm_sampling(replace(PARAMS, extra={"suppress_tokens": None}))


def test_options_without_a_counterpart_are_refused_all_at_once():
    extra = {"no_repeat_ngram_size": 3, "cache_implementation": "static", "min_new_tokens": 2}
    with pytest.raises(ValueError, match="`cache_implementation`, `no_repeat_ngram_size`"):
        vllm_sampling(replace(PARAMS, extra=extra))
    with pytest.raises(ValueError, match="`temperature` must be at least 0.01 with vLLM; it is 0.001"):
        vllm_sampling(replace(PARAMS, temperature=0.001))


def test_a_seed_depends_on_each_part_of_what_names_a_completion_and_on_nothing_else():
    seeds = {
        completion_seed(RolloutKey(seed, step, stream=stream), row, sample)
        for seed in range(3)
        for step in range(3)
        for stream in range(3)
        for row in range(4)
        for sample in range(4)
    }
    assert len(seeds) == 3**3 * 4**2
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert completion_seed(KEY, 2, 1) == completion_seed(RolloutKey(seed=3, step=5), 2, 1)


def test_requests_stand_in_the_order_of_the_prompts_each_with_its_seed():
    prompts = tiny.prompts([3, 4])[::-1]
    requests = build_requests(prompts, 2, {"top_p": 0.5}, KEY)
    assert [r.prompt_ids for r in requests] == [p.token_ids for p in prompts for _ in range(2)]
    assert [r.options for r in requests] == [
        {"top_p": 0.5, "seed": completion_seed(KEY, row, sample)} for row in (1, 0) for sample in (0, 1)
    ]


def test_answers_are_read_from_objects_and_from_json():
    half, tenth, three_halves = (SimpleNamespace(logprob=-x) for x in (0.5, 0.1, 1.5))
    logprobs = [{5: half, 9: tenth}, {2: three_halves}]
    output = SimpleNamespace(token_ids=[5, 2], logprobs=logprobs, finish_reason="stop")
    choice = {"token_ids": [5, 2], "logprobs": {"token_logprobs": [-0.5, -1.5]}, "finish_reason": "stop"}
    expected = Sampled((5, 2), (-0.5, -1.5), "stop")
    assert from_output(SimpleNamespace(outputs=[output])) == from_response({"choices": [choice]}) == expected


@pytest.mark.parametrize("reason", ["abort", None])
def test_an_answer_that_is_no_finished_completion_is_refused(reason):
    choice = {"token_ids": [5], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": reason}
    with pytest.raises(RuntimeError, match=f"finish reason is {reason!r}"):
        from_response({"choices": [choice]})


@pytest.mark.smoke
def test_groups_hold_k_completions_with_text_and_version():
    prompts = tiny.prompts([3, 4])
    word = tiny.VOCABULARY - 40  # "w0"
    sampled = [Sampled((word + i, tiny.EOS), (-1.0, -2.0), "stop") for i in range(4)]
    groups = build_groups(prompts, sampled, tiny.tokenizer(), version=6)
    assert [g.prompt for g in groups] == prompts
    assert [[c.text for c in g.completions] for g in groups] == [[" w0", " w1"], [" w2", " w3"]]
    assert {c.policy_version for g in groups for c in g.completions} == {6}
    assert build_groups([], [], tiny.tokenizer(), version=6) == []


def test_further_samples_have_the_seeds_that_come_next():
    prompts = tiny.prompts([3, 4])
    six = [r.options["seed"] for r in build_requests(prompts, 6, vllm_sampling(PARAMS), KEY)]
    two = [r.options["seed"] for r in build_requests(prompts, 2, vllm_sampling(PARAMS), replace(KEY, first_sample=4))]
    assert two == six[4:6] + six[10:12]
