"""Metrics that look as if they add up do, and a log reads from what matters to what does not."""

import json

import pytest

from online_dpo.training.display.figures import in_order
from support import training


def near(expected):
    return pytest.approx(expected, rel=1e-5, abs=1e-5)


def short(completions, **_):
    return [-float(len(text)) if text.count(" ") % 3 else None for text in completions]


def second_is_longer(prompts, completion_pairs, shuffle_order=True):
    return [int(len(second) > len(first)) for first, second in completion_pairs]


def assert_sums(log):
    usable = log["prompts"] - log["dropped/invalid_prompt"]
    dropped = {name: value for name, value in log.items() if name.startswith("dropped/")}
    assert log["prompts"] == log["pairs/groups"] + sum(dropped.values())
    assert log["pairs/count"] >= log["pairs/groups"] > 0
    assert log["pairs/usable_ratio"] == near(log["pairs/groups"] / usable)
    assert log["pairs/tie_rate"] == near(dropped.get("dropped/tie", 0) / usable)
    assert log["rewards/margins"] == near(log["rewards/chosen"] - log["rewards/rejected"])
    assert log["objective/non_score_reward"] == near(-log["beta"] * log["objective/kl"])
    assert log["val/contain_eos_token"] + log["completions/clipped_ratio"] == near(1)
    if "objective/scores" in log:
        both = log["objective/trained_scores"] + log["objective/non_score_reward"]
        assert log["objective/rlhf_reward"] == near(both)
    else:
        assert "objective/rlhf_reward" not in log and "objective/trained_scores" not in log
    phases = sum(log[f"time/{name}"] for name in ("sync", "rollout", "scoring", "training", "waiting"))
    assert log["time/reference"] < log["time/training"] < phases < log["time/all"]


@pytest.mark.parametrize(
    "fields",
    [
        dict(num_completions=2),
        dict(num_completions=4, pair_selection="all_pairs", reward_normalization="group"),
        dict(num_completions=2, method="xpo", xpo_alpha=1e-3),
        dict(num_completions=4, judged=True),
    ],
    ids=["a pair a prompt", "all pairs, normalised", "xpo", "a judge alone"],
)
def test_sums(tmp_path, fields):
    fields = {**fields}
    judged = fields.pop("judged", False)
    feedback = dict(reward_funcs=None) if judged else dict(reward_funcs=[training.word_reward, short])
    made = training.trainer(
        tmp_path,
        max_steps=3,
        gradient_accumulation_steps=2,
        max_tokens_per_pass=64,
        beta=0.5,
        learning_rate=1e-2,
        kwargs={"judge": second_is_longer} if judged else {},
        **feedback,
        **fields,
    )
    made.train()
    logs = [log for log in made.state.log_history if "prompts" in log]
    assert len(logs) == 3
    for log in logs:
        assert_sums(log)


def test_all_completions_and_those_that_are_trained_on_have_different_scores(tmp_path):
    """Of four completions two are trained on: the best and the worst."""
    made = training.trainer(tmp_path, num_completions=4)
    made.train()
    [log] = [log for log in made.state.log_history if "prompts" in log]
    assert log["objective/trained_scores"] != near(log["objective/scores"])
    assert_sums(log)


def test_a_printed_log_begins_with_what_matters(tmp_path, capsys):
    """As `transformers.PrinterCallback` prints it, and as it stands in the history."""
    fields = dict(num_completions=2, eval_strategy="steps", eval_steps=1, max_steps=1)
    made = training.trainer(tmp_path, kwargs={"eval_dataset": training.dataset((3, 4))}, **fields)
    made.train()
    log, evaluation, _ = made.state.log_history
    names = list(log)
    assert names[:5] == ["step", "epoch", "loss", "objective/scores", "objective/trained_scores"]
    assert names[5:8] == ["objective/kl", "rewards/accuracies", "rewards/margins"]
    assert names[-1].startswith("time/") and names.index("learning_rate") > names.index("prompts")
    times = [name for name in names if name.startswith("time/")]
    assert len(times) == 13 and times == names[-13:]
    assert list(evaluation)[:6] == [
        "step",
        "epoch",
        "eval_loss",
        "eval_objective/scores",
        "eval_objective/reference_scores",
        "eval_objective/kl",
    ]
    assert list(evaluation)[6] == "eval_win_rate" and list(evaluation)[-1] == "eval_steps_per_second"
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert printed[0].startswith("{'epoch': '0.3333', 'loss': '") and printed[1].startswith(
        "{'epoch': '0.3333', 'eval_"
    )
    saved = json.loads(json.dumps(made.state.log_history))
    assert list(saved[0]) == names


def test_the_order_does_not_depend_on_who_came_first():
    """Ranks record the same metrics in different orders."""
    names = [
        "time/rollout",
        "own",
        "scores/b",
        "scores/a",
        "loss",
        "eval",
        "objective/kl",
        "win_rate_ci95_low",
        "win_rate",
    ]
    expected = ["loss", "objective/kl", "win_rate", "win_rate_ci95_low", "scores/a", "scores/b", "eval", "own"]
    expected += ["time/rollout"]
    assert list(in_order(dict.fromkeys(names))) == list(in_order(dict.fromkeys(reversed(names)))) == expected
