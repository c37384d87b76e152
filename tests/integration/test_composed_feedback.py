"""Scorers together: normalised, with a price on length, and a judge among a reward's best, in short real runs."""

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification

from online_dpo.cli.evaluation.plan import plan_eval
from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.run_file import plan_run
from online_dpo.rollout.params import RolloutKey
from support import tiny
from support.run_files import fill_folder, trainer_of, write_run_file
from support.training import LENGTHS, assert_same, dataset, gradient, trainer, weights, word_reward

ENDS = (1, 5, 6, 7, 8, 9, 10)
"""Token ids that end a completion, so that lengths differ."""


def huge(completions, **_):
    """On another scale than `word_reward`, and of another opinion."""
    return [1000.0 * len(set(text.split())) for text in completions]


def longer(prompts, pairs, shuffle_order=True):
    lengths = [[len(text.split()) for text in pair] for pair in pairs]
    return [-1 if a == b else int(b > a) for a, b in lengths]


class Asked:
    """The judge above, which remembers what it was asked."""

    def __init__(self):
        self.pairs = []

    def judge(self, prompts, completion_pairs, shuffle_order=True):
        self.pairs += completion_pairs
        return longer(prompts, completion_pairs)


def run(tmp_path, kwargs=None, **fields):
    defaults = dict(num_completions=5, per_device_train_batch_size=12)
    made = trainer(tmp_path, kwargs={"eval_dataset": dataset(), **(kwargs or {})}, **{**defaults, **fields})
    made.sampler.params = made.sampler.params.__class__(**{**made.sampler.params.__dict__, "end_token_ids": ENDS})
    return made


def step_log(made):
    return next(log for log in made.state.log_history if "prompts" in log)


def watched(made):
    """What becomes of the groups of each step."""
    formed, form = [], made.collector.form_pairs
    made.collector.form_pairs = lambda *args, **kwargs: formed.append(form(*args, **kwargs)) or formed[-1]
    return formed


def sampled(made, stream=0, step=0):
    """What a fresh trainer samples: in its first step of training, or in an evaluation."""
    return made.sampler.engine.generate(
        tiny.prompts(LENGTHS), made.args.num_completions, made.sampler.params, RolloutKey(42, step, stream)
    )


def judged(made):
    """What `longer` says of the first completions of an evaluation and the reference's: the probability that ours is
    the better one, where it can tell, and by how many tokens ours is longer.
    """
    answers = []
    for group, rival in zip(sampled(made, stream=1), made.reference_answers.to(tiny.prompts(LENGTHS)), strict=True):
        ours, theirs = group.completions[0], rival.completions[0]
        [rank] = [None] if ours.text == theirs.text else longer([], [(ours.text, theirs.text)])
        if rank != -1:
            tokens = len(ours.token_ids) - len(theirs.token_ids)
            answers.append((0.5 if rank is None else 1.0 - rank, tokens))
    return answers


def deviations(values):
    values = np.array(values, dtype=float)
    return (values - values.mean()) / values.std() if values.std() > 0 else 0 * values


# --- normalisation --------------------------------------------------------------------------------------------------


def test_normalised_rewards_form_the_pairs_and_raw_ones_are_reported(tmp_path):
    options = dict(reward_funcs=[huge, word_reward], reward_weights=[1.0, 2.0])
    made = run(tmp_path, reward_normalization="group", **options)
    raw, totals = [], {}
    for group in sampled(made):
        texts = [c.text for c in group.completions]
        raw += [a + 2 * b for a, b in zip(huge(texts), word_reward(texts), strict=True)]
        totals[group.prompt.row] = np.round(deviations(huge(texts)) + 2 * deviations(word_reward(texts)), 6)
    formed = watched(made)
    made.train()
    log = step_log(made)
    assert log["objective/scores"] == pytest.approx(np.mean(raw)) and log["objective/scores"] > 1000
    assert log["scores/huge"] > 1000 and log["scores/word_reward"] < 10
    [pairing] = formed
    assert {p.group.prompt.row for p in pairing.pairs} == {row for row, total in totals.items() if len(set(total)) > 1}
    for pair in pairing.pairs:
        total = totals[pair.group.prompt.row]
        assert (total[pair.chosen], total[pair.rejected]) == (total.max(), total.min())
        assert (
            pair.chosen_score
            == 1000 * len(set(pair.chosen_completion.text.split())) + 2 * word_reward([pair.chosen_completion.text])[0]
        )
    plain = run(tmp_path, **options)
    plain.train()
    assert log["objective/scores_margin"] < step_log(plain)["objective/scores_margin"]
    assert plain.evaluate()["eval_objective/reference_scores"] == made.evaluate()["eval_objective/reference_scores"]


def test_evaluation_compares_raw_scores(tmp_path):
    """One completion of the reference alone has no deviation."""
    reference = tiny.causal_lm(seed=5, sharpness=1.0)
    made = run(tmp_path, {"ref_model": reference}, reward_funcs=[huge, word_reward], reward_normalization="group")
    metrics = made.evaluate()
    scores, wins = [], []
    for group, rival in zip(sampled(made, stream=1), made.reference_answers.to(tiny.prompts(LENGTHS)), strict=True):
        mine, theirs = (
            [a + b for a, b in zip(huge(texts), word_reward(texts), strict=True)]
            for texts in ([c.text for c in g.completions] for g in (group, rival))
        )
        scores += mine
        wins.append(np.mean([1.0 if s > theirs[0] else 0.5 if s == theirs[0] else 0.0 for s in mine]))
    assert metrics["eval_objective/scores"] == pytest.approx(np.mean(scores))
    assert metrics["eval_win_rate"] == pytest.approx(np.mean(wins)) and 0 < np.mean(wins) < 1


def test_the_gradient_with_normalised_rewards_does_not_depend_on_the_cut(tmp_path):
    options = dict(reward_funcs=[huge, word_reward], reward_normalization=["group", "none"], label_temperature=1.0)
    options |= dict(num_completions=4)
    whole = gradient(tmp_path, per_device_train_batch_size=8, **options)
    cut = gradient(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert_same(cut, whole, rtol=1e-5)


# --- length ---------------------------------------------------------------------------------------------------------


def test_a_price_on_tokens_is_in_the_scores_and_makes_the_short_ones_win(tmp_path):
    made = run(tmp_path, reward_funcs=lambda completions, **_: [0.0] * len(completions), length_penalty=0.25)
    expected = [-0.25 * len(c.token_ids) for g in sampled(made, stream=1) for c in g.completions]
    rivals = [-0.25 * len(g.completions[0].token_ids) for g in made.reference_answers.to(tiny.prompts(LENGTHS))]
    metrics = made.evaluate()
    assert metrics["eval_objective/scores"] == pytest.approx(np.mean(expected))
    assert metrics["eval_objective/reference_scores"] == pytest.approx(np.mean(rivals))
    made.train()
    log = step_log(made)
    assert log["objective/scores"] == pytest.approx(-0.25 * log["completions/mean_length"])
    assert log["completions/chosen_minus_rejected_length"] < 0
    assert log["objective/scores_margin"] == pytest.approx(-0.25 * log["completions/chosen_minus_rejected_length"])


def test_a_price_on_tokens_outweighs_a_judge(tmp_path):
    """The judge likes what is longer, and is certain: 0.99 there, which 5 nats a token turn around."""
    made = run(tmp_path, {"judge": longer}, reward_funcs=None)
    made.train()
    assert step_log(made)["completions/chosen_minus_rejected_length"] > 0
    made = run(tmp_path, {"judge": longer}, reward_funcs=None, length_penalty=5.0)
    answers, expected = judged(made), []
    for answer, tokens in answers:
        odds = np.log(0.99 / 0.01) * np.sign(answer - 0.5) - 5.0 * tokens
        expected.append(answer if tokens == 0 else 1 / (1 + np.exp(-odds)))
    assert made.evaluate()["eval_win_rate"] == pytest.approx(np.mean(expected))
    assert abs(np.mean(expected) - np.mean([answer for answer, _ in answers])) > 0.05
    made.train()
    assert step_log(made)["completions/chosen_minus_rejected_length"] < 0


# --- a judge among the best by a reward -----------------------------------------------------------------------------


def test_a_judge_among_the_best_has_pairs_and_metrics_of_both(tmp_path):
    judge = Asked()
    made = run(tmp_path, {"judge": judge}, judge_top=3, label_smoothing=0.1)
    formed = watched(made)
    made.train()
    log = step_log(made)
    assert log["judge/duels"] == len(judge.pairs) <= 3 * 12 and log["judge/unanswered_ratio"] < 1
    scores = {}
    for group in sampled(run(tmp_path)):
        scores[group.prompt.row] = word_reward([c.text for c in group.completions])
    assert log["objective/scores"] == log["scores/word_reward"] == pytest.approx(np.mean(list(scores.values())))
    assert formed[0].pairs
    for pair in formed[0].pairs:
        row = scores[pair.group.prompt.row]
        assert (pair.chosen_score, pair.rejected_score) == (row[pair.chosen], row[pair.rejected])
        assert pair.rejected_score == min(row) and pair.chosen_score >= sorted(row)[-3] and pair.probability == 1.0
        assert len(pair.chosen_completion.text.split()) > len(pair.rejected_completion.text.split())
    assert log["objective/scores_margin"] == pytest.approx(np.mean([pair.margin for pair in formed[0].pairs]))
    assert log["pairs/probability"] == 1.0 and "objective/rlhf_reward" in log
    assert log["pairs/count"] + sum(v for k, v in log.items() if k.startswith("dropped/")) == log["prompts"] == 12
    made.create_model_card()
    assert "word_reward, Asked" in (tmp_path / "README.md").read_text()


def test_evaluation_takes_the_win_rate_from_the_judge_and_scores_from_the_reward(tmp_path):
    made = run(tmp_path, {"judge": longer, "ref_model": tiny.causal_lm(seed=5, sharpness=1.0)}, judge_top=2)
    metrics = made.evaluate()
    wins = [answer for answer, _ in judged(made)]
    assert metrics["eval_win_rate"] == pytest.approx(np.mean(wins)) and 0 < np.mean(wins) < 1
    mine, theirs = sampled(made, stream=1), made.reference_answers.to(tiny.prompts(LENGTHS))
    for name, groups in (("scores", mine), ("reference_scores", theirs)):
        expected = np.mean([s for g in groups for s in word_reward([c.text for c in g.completions])])
        assert metrics[f"eval_objective/{name}"] == pytest.approx(expected)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_resumed_run_with_a_judge_among_the_best(tmp_path, max_staleness):
    options = dict(judge_top=3, max_steps=4, per_device_train_batch_size=4, max_staleness=max_staleness)
    options |= dict(save_strategy="steps", save_steps=2, reward_normalization="group", length_penalty=0.01)
    whole = run(tmp_path, {"judge": longer}, **options)
    whole.train()
    resumed = run(tmp_path, {"judge": longer}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, weights(resumed.model)[name]) for name, value in weights(whole.model).items())
    assert (tmp_path / "checkpoint-2" / "lookahead-0.json").is_file() == (max_staleness > 0)


@pytest.mark.parametrize(
    "kwargs, fields, message",
    [
        ({}, dict(judge_top=2), "give a `judge` as well"),
        ({"judge": longer}, dict(judge_top=2, reward_funcs=None), "give a reward"),
        ({"judge": longer}, dict(judge_top=1), r"`judge_top` must be from 2 to 5 completions; it is 1"),
        ({"judge": longer}, dict(judge_top=6), r"`judge_top` must be from 2 to 5 completions; it is 6"),
        ({"judge": longer}, dict(judge_top=2, num_completions=2, method="xpo"), "`method='xpo'` has one of them"),
        ({"judge": longer}, dict(judge_top=2, pair_selection="all_pairs"), "a judge goes with 'best_worst'"),
        ({"judge": longer}, dict(judge_top=2, min_margin=1.0), "`min_margin` needs scores to make the pairs"),
        ({}, dict(reward_normalization="batch"), "must be one of none, group; it is 'batch'"),
        ({}, dict(reward_normalization=["group", "none"]), "has 2 entries, but there are 1 reward functions"),
        ({}, dict(length_penalty=0.0), "`length_penalty` must be above 0"),
        ({}, dict(length_penalty=float("inf")), "`length_penalty` must be above 0"),
        ({}, dict(missing_eos_penalty=float("inf")), "`missing_eos_penalty` must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_before_the_policy_is_loaded(tmp_path, kwargs, fields, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, kwargs, model="owner/never-asked-for", **fields)


def test_what_is_ignored_gives_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="the reward is used, the judge is not. With `judge_top`"):
        run(tmp_path, {"judge": longer})
    with pytest.warns(UserWarning, match="Ignored without a reward: reward_weights, reward_normalization"):
        run(tmp_path, {"judge": longer}, reward_funcs=None, reward_weights=[2.0], reward_normalization="group")


# --- run files ------------------------------------------------------------------------------------------------------


FEEDBACK = """
def unique(completions, **_):
    return [float(len(set(text.split()))) for text in completions]

def longer(prompts, completion_pairs, shuffle_order=True):
    return [int(len(second) > len(first)) for first, second in completion_pairs]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = fill_folder(tmp_path_factory.mktemp("composed"), FEEDBACK)
    reward = LlamaForSequenceClassification(tiny.config("llama", num_labels=1, hidden_size=16))
    reward.save_pretrained(made / "reward")
    tiny.tokenizer().save_pretrained(made / "reward")
    return made


def run_file(folder, **fields):
    return write_run_file(folder, **{"reward_model_path": "./reward", "num_completions": 6, **fields})


def trained(path):
    made = trainer_of(path)
    made.train()
    return step_log(made)


def test_a_run_file_with_a_reward_model_and_a_judge_for_its_best(folder):
    log = trained(run_file(folder, judge="feedback.py:longer", judge_top=3))
    assert log["pairs/count"] > 0 and 8 < log["judge/duels"] <= 24 and "scores/reward" in log


def test_a_run_file_with_rewards_on_different_scales_and_a_price_on_length(folder):
    rewards = dict(reward_funcs="feedback.py:unique", reward_weights=[1, 0.5], length_penalty="1e-2")
    for kinds in ("group", ["none", "group"]):
        log = trained(run_file(folder, reward_normalization=kinds, **rewards))
        assert log["pairs/count"] > 0 and log["scores/unique"] > 1


def test_a_run_file_that_lacks_one_of_both_says_so_at_its_line(folder):
    path = run_file(folder, judge_top=3)
    line = path.read_text().splitlines().index("judge_top: 3") + 1
    with pytest.raises(UsageError, match=rf"run.yaml:{line}: `judge_top` .* there is no judge. Give `judge`."):
        plan_run(path, [])
    path = run_file(folder, judge_top=3, judge="feedback.py:longer", reward_model_path=None)
    with pytest.raises(UsageError, match="there is no reward. Give `reward_funcs` or `reward_model_path`"):
        plan_run(path, [])


def test_an_evaluation_of_such_a_run_asks_its_judge(folder, monkeypatch):
    monkeypatch.chdir(folder)
    fields = dict(judge="feedback.py:longer", output_dir="policy", eval_dataset_name="data.jsonl", length_penalty=0.5)
    plan = plan_eval(run_file(folder, judge_top=3, **fields), [])
    assert plan.judge is not None and plan.judge.name == "longer" and plan.trained_on and not plan.rewards
    assert plan.training["length_penalty"] == 0.5 and "judge_top" not in plan.training
    plan = plan_eval(run_file(folder, **fields), [])
    assert plan.judge is None and plan.trained_on
    plan = plan_eval(run_file(folder, judge_top=3, eval_reward_funcs="feedback.py:unique", **fields), [])
    assert plan.judge is None and not plan.trained_on and "length_penalty" not in plan.training
