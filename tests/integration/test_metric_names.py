"""What runs log is described in docs/reference/metrics.md, and what is described there some run logs."""

from contextlib import suppress

import pytest

from online_dpo.errors import NothingTrainedError
from online_dpo.scoring.judges.llm.judge import LLMJudge
from online_dpo.stats.catalogue import CATALOGUE, description, undescribed
from support import tiny
from support.endpoint import says, serving, shown
from support.pairwise_folders import pairrm_folder
from support.training import dataset, trainer, word_reward

ELSEWHERE = {
    "perf/device_memory": "on a GPU",
    "perf/device_memory_peak": "on a GPU",
    "perf/gpu_utilization": "on an NVIDIA GPU",
    "perf/gpu_memory": "on an NVIDIA GPU",
    "perf/mfu": "on a GPU whose peak is known",
    **dict.fromkeys(("judge/questions", "judge/votes", "judge/ties", "judge/unanswered"), "with people as judges"),
    "objective/kl_by_position/256-up": "answers longer than a tiny model writes",
}
"""Metrics that no run here has, each with the place that has it; their values are tested in unit tests."""
OWN = ("variety", "mine/", "eval_variety")
"""Beginnings of names that the runs' own functions give."""


def variety(completions, log_metric, **_):
    log_metric("variety/called", 1.0)
    return [None if i % 7 == 0 else float(len(set(text.split()))) for i, text in enumerate(completions)]


def more_words(body, number):
    first, second = shown(body)
    return says("A", 0.8) if len(first) > len(second) else says("B", 0.2)


def not_finite_once():
    model, calls = tiny.causal_lm(sharpness=1.0), []

    def hook(module, args, output):
        if module.training:
            calls.append(1)
            return (output[0] * float("nan"), output[1]) if len(calls) == 1 else None
        return None

    model.register_forward_hook(hook)
    return model


RUNS = {
    "rewards": dict(
        reward_funcs=[word_reward, variety],
        kwargs={"eval_dataset": dataset((3, 4, 5)), "eval_reward_funcs": word_reward},
        **dict(eval_strategy="steps", eval_steps=1, num_completions=4, max_new_tokens=80, max_length=120),
        **dict(include_num_input_tokens_seen="all", max_prompt_length=8),
    ),
    "pairs": dict(
        num_completions=4,
        pair_selection="all_pairs",
        resample_rounds=1,
        min_margin=1.5,
        max_length_ratio=1.5,
        max_steps=4,
        max_new_tokens=16,
    ),
    "skipped": dict(model=not_finite_once, skipped_step_lr_factor=0.5, max_steps=3),
    "xpo": dict(method="xpo", num_completions=2),
    "nash_md": dict(method="nash_md", num_completions=2, temperature=1.0),
    "stale": dict(max_staleness=1, max_steps=3),
}


def logged(made):
    with suppress(NothingTrainedError):
        made.train()
    return {name for log in made.state.log_history for name in log}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names that each run logs, by the run."""
    found = {}
    for case, options in RUNS.items():
        model = options["model"]() if "model" in options else None
        made = trainer(tmp_path_factory.mktemp(case), **{"max_steps": 2, **options, "model": model})
        if case == "rewards":
            prepared = set(made.evaluate())  # before training: the model is made ready by it
        found[case] = logged(made)
    found["rewards"] |= prepared
    with serving(more_words) as endpoint:
        judge = LLMJudge(model="m", base_url=endpoint.url, cache=None)
        found["judge"] = logged(trainer(tmp_path_factory.mktemp("judge"), reward_funcs=None, kwargs={"judge": judge}))
    folder = pairrm_folder(tmp_path_factory.mktemp("pairrm") / "model")
    options = dict(reward_funcs=None, kwargs={"judge": str(folder)}, num_completions=2)
    found["pairrm"] = logged(trainer(tmp_path_factory.mktemp("pairwise"), **options))
    return found


def test_every_name_is_described(names):
    unknown = {case: [n for n in undescribed(of_run) if not n.startswith(OWN)] for case, of_run in names.items()}
    assert not {case: missing for case, missing in unknown.items() if missing}


def test_every_description_is_of_a_metric_that_some_run_has(names):
    seen = {description(name).name for of_run in names.values() for name in of_run if description(name)}
    described = {metric.name for members in CATALOGUE.values() for metric in members}
    assert described - seen == ELSEWHERE.keys()
