"""Looking ahead: what is trained on, what is logged, and how much time it hides."""

import time

import pytest
import torch
from transformers import TrainerCallback

from online_dpo.errors import OutOfSyncError
from online_dpo.rollout.builtin.engine import TransformersEngine
from support import tiny
from support.training import dataset, step_logs, trainer, weights, word_reward


def test_staleness_is_logged_and_stamped(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(({g.policy_version for p in last for g in p.group.completions}, state.global_step))

    made = trainer(tmp_path, max_steps=5, max_staleness=2, kwargs={"callbacks": [Watch()]})
    pack, last = made.objective.pack, []
    made.objective.pack = lambda model, pairs, count: (last.clear(), last.extend(pairs), pack(model, pairs, count))[-1]
    made.train()
    # Three steps an epoch: at the start of one, all that may be begun is begun with the weights of that time.
    assert seen == [({0}, 0), ({0}, 1), ({0}, 2), ({3}, 3), ({3}, 4)]
    assert [entry["sampling/staleness"] for entry in step_logs(made)] == [0, 1, 2, 0, 1]
    on_policy = trainer(tmp_path, max_steps=5)
    on_policy.train()
    assert [entry["sampling/staleness"] for entry in step_logs(on_policy)] == [0] * 5
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in step_logs(on_policy)) < 2e-5
    assert step_logs(made)[1]["sampling/sampling_logp_difference/mean"] > 1e-4


def test_in_the_middle_of_an_epoch_completions_are_one_step_behind(tmp_path):
    made = trainer(tmp_path, max_steps=6, max_staleness=1, per_device_train_batch_size=2)
    made.train()
    assert [entry["sampling/staleness"] for entry in step_logs(made)] == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_no_prompt_is_lost_or_counted_at_the_wrong_step(tmp_path, max_staleness):
    options = dict(num_train_epochs=2, max_steps=-1, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    rows, names = dataset(), []

    def reward(completions, name, **_):
        names.extend(name[::2])
        return word_reward(completions)

    made = trainer(tmp_path, reward_funcs=reward, train_dataset=rows, max_staleness=max_staleness, **options)
    made.train()
    assert sorted(names) == sorted(2 * list(rows["name"]))
    assert [entry["prompts"] for entry in step_logs(made)] == [9, 3, 9, 3]
    for entry in step_logs(made):
        assert entry["prompts"] == entry["pairs/count"] + sum(v for k, v in entry.items() if k.startswith("dropped/"))


class SlowStep(TrainerCallback):
    """A device that is busy for a while, as a larger model would be."""

    def on_pre_optimizer_step(self, *args, **kwargs):
        time.sleep(0.6)


def seconds_of(tmp_path, max_staleness):
    def reward(completions, **_):
        time.sleep(0.6)
        return word_reward(completions)

    options = dict(max_steps=8, per_device_train_batch_size=1, max_staleness=max_staleness)
    made = trainer(tmp_path, reward_funcs=reward, kwargs={"callbacks": [SlowStep()]}, **options)
    start = time.perf_counter()
    made.train()
    return time.perf_counter() - start, step_logs(made)


@pytest.mark.slow
def test_a_slow_scorer_is_hidden_behind_training(tmp_path):
    waiting, on_policy = seconds_of(tmp_path, 0)
    overlapped, ahead = seconds_of(tmp_path, 1)
    scoring = sum(entry["time/scoring"] for entry in ahead)
    assert scoring >= 8 * 0.6 and sum(entry["time/scoring"] for entry in on_policy) >= 8 * 0.6
    hidden = (waiting - overlapped) / (8 * 0.6)
    assert hidden >= 0.8, f"{hidden:.2f} of the scoring time"
    assert sum(entry["time/waiting"] for entry in ahead) < scoring


def test_a_failing_scorer_ends_the_run_with_its_own_error(tmp_path):
    def reward(completions, **_):
        raise ConnectionError("the judge is gone")

    for max_staleness in (0, 1):
        with pytest.raises(Exception, match="the judge is gone"):
            trainer(tmp_path, reward_funcs=reward, max_staleness=max_staleness, max_steps=3).train()


def test_evaluation_between_steps_changes_nothing(tmp_path):
    runs = []
    for evaluates in ("no", "steps"):
        made = trainer(
            tmp_path,
            max_steps=4,
            max_staleness=1,
            per_device_train_batch_size=2,
            eval_strategy=evaluates,
            eval_steps=1,
            kwargs={"eval_dataset": dataset(lengths=(4, 5))},
        )
        made.train()
        runs.append(weights(made.model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


class Copying(TransformersEngine):
    """An engine with a copy of the weights, which may forget to renew it."""

    has_own_weights = True
    forgets_from = 10**9

    def sync(self, model, version):
        if version < self.forgets_from:
            self.model.load_state_dict(model.state_dict())
        self.version = version


def with_copy(tmp_path, forgets_from, **fields):
    made = trainer(tmp_path, max_steps=4, learning_rate=1e-2, **fields)
    made.sampler.engine = Copying(tiny.causal_lm(), tiny.tokenizer())
    made.sampler.engine.forgets_from = forgets_from
    return made


@pytest.mark.slow
def test_an_engine_that_samples_from_stale_weights_is_found(tmp_path):
    with_copy(tmp_path, 10**9, sync_check_steps=1).train()
    with pytest.raises(OutOfSyncError, match="After the weights of step 0"):
        with_copy(tmp_path, 0).train()
    with pytest.raises(OutOfSyncError, match="After the weights of step 3"):
        with_copy(tmp_path, 2, sync_check_steps=3).train()
    made = with_copy(tmp_path, 2, sync_check_steps=0)
    made.train()
    assert step_logs(made)[3]["sampling/sampling_logp_difference/mean"] > 1e-3


def test_an_engine_that_computes_in_half_precision_may_differ_by_its_rounding(tmp_path, caplog):
    """As a server that was started in a checkpoint's own type does from a trainer in fp32; stale weights are found."""

    def with_half_copy(forgets_from, **fields):
        made = trainer(tmp_path, max_steps=2, learning_rate=1e-1, optim="sgd", **fields)
        made.sampler.engine = Copying(tiny.causal_lm().bfloat16(), tiny.tokenizer())
        made.sampler.engine.own_dtype = torch.bfloat16
        made.sampler.engine.forgets_from = forgets_from
        return made

    made = with_half_copy(10**9, sync_check_steps=1)
    made.train()
    assert 1e-4 < step_logs(made)[0]["sampling/sampling_logp_difference/mean"] < 3e-2
    said = [r.getMessage() for r in caplog.records if "The sampler computes in" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("The sampler computes in bfloat16, the trainer in float32")
    with pytest.raises(OutOfSyncError, match="After the weights of step 0"):
        with_half_copy(0).train()
