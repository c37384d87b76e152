"""The reference of a run: a copy, a model of its own, one that follows the policy, or none."""

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from online_dpo.modeling.reference import SyncedReference
from online_dpo.rollout.params import RolloutKey
from support import tiny
from support.training import LENGTHS, LORA, config, dataset, train_logs, trainer, weights


def test_the_reference_is_a_frozen_copy_or_the_model_given(tmp_path):
    made = trainer(tmp_path, max_steps=3, learning_rate=0.05)
    before = weights(made.model)
    made.train()
    with made.reference.active() as reference:
        assert all(torch.equal(p, before[name]) for name, p in reference.named_parameters())
        assert not any(p.requires_grad for p in reference.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in made.model.named_parameters())

    tiny.causal_lm(seed=9).save_pretrained(tmp_path / "reference")
    other = trainer(tmp_path, kwargs={"ref_model": str(tmp_path / "reference")})
    with other.reference.active() as reference:
        assert all(torch.equal(p, tiny.causal_lm(seed=9).get_parameter(n)) for n, p in reference.named_parameters())


def test_without_a_reference_the_same_is_learnt_and_what_is_relative_to_it_is_absent(tmp_path):
    options = dict(max_steps=2, learning_rate=0.05, loss_type=["simpo", "sft"], beta=2.0)
    without, plain = (
        trainer(tmp_path, reference_free=free, kwargs={"eval_dataset": dataset()}, **options) for free in (True, False)
    )
    for made in (without, plain):
        made.train()
    assert all(torch.equal(p, without.model.get_parameter(name)) for name, p in plain.model.named_parameters())
    ours, theirs = train_logs(without)[-1], train_logs(plain)[-1]
    relative = {"objective/kl", "objective/non_score_reward", "objective/rlhf_reward", "objective/trained_scores"}
    relative |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    relative |= {"objective/kl_by_position/0-15"}
    assert theirs.keys() - ours.keys() == relative and ours["loss"] == theirs["loss"]
    ours, theirs = without.evaluate(), plain.evaluate()
    absent = {"eval_win_rate", "eval_win_rate_ci95_low", "eval_win_rate_ci95_high", "eval_objective/kl"}
    assert theirs.keys() - ours.keys() == absent | {"eval_objective/reference_scores"}
    assert ours["eval_loss"] == theirs["eval_loss"]


def test_a_reference_that_something_needs_cannot_be_left_out(tmp_path):
    with pytest.raises(ValueError, match="nothing reads it"):
        trainer(tmp_path, reference_free=True, loss_type="simpo", kwargs={"ref_model": tiny.causal_lm()})
    with pytest.raises(ValueError, match="The loss `sigmoid` needs a reference"):
        config(tmp_path, reference_free=True, loss_type=["simpo", "sigmoid"])
    with pytest.raises(ValueError, match="`sync_ref_model` needs a reference"):
        config(tmp_path, reference_free=True, loss_type="simpo", sync_ref_model=True)


class KeepWeights(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))


def test_a_reference_that_follows_is_mixed_every_few_steps(tmp_path):
    keep = KeepWeights()
    made = trainer(
        tmp_path,
        max_steps=5,
        learning_rate=0.05,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=0.3,
        kwargs={"callbacks": [keep], "eval_dataset": dataset()},
    )
    start = weights(made.model)
    made.train()
    for name, value in start.items():
        second, fourth = keep.steps[1][name], keep.steps[3][name]
        expected = 0.7 * (0.7 * value + 0.3 * second) + 0.3 * fourth
        torch.testing.assert_close(made.reference.model.get_parameter(name), expected)
        with made.reference.at_start() as reference:
            assert torch.equal(reference.get_parameter(name), value)
        torch.testing.assert_close(made.reference.model.get_parameter(name), expected)


def test_win_rates_are_against_the_start_and_kl_against_the_reference_as_it_is(tmp_path):
    kwargs = {"eval_dataset": dataset()}
    options = dict(max_steps=4, learning_rate=0.05)
    follows = trainer(
        tmp_path, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, kwargs=kwargs, **options
    )
    follows.train()
    metrics = follows.evaluate()
    assert metrics["eval_objective/kl"] == pytest.approx(0, abs=1e-5)  # the reference is the policy now
    start = tiny.causal_lm(sharpness=1.0)
    expected = follows.sampler.engine.__class__(start, follows.tokenizer).generate(
        tiny.prompts(LENGTHS), 1, follows.sampler.params, RolloutKey(42, 0, 2)
    )
    kept = follows.reference_answers.to([group.prompt for group in expected])  # no model is asked again
    assert [g.completions[0].token_ids for g in kept] == [g.completions[0].token_ids for g in expected]


def test_shares_too_small_for_half_precision_add_up():
    reference, policy = (tiny.causal_lm(seed=seed, sharpness=1.0).bfloat16() for seed in (0, 1))
    start = {name: p.float() for name, p in reference.named_parameters()}
    synced = SyncedReference(reference, policy, alpha=1e-3, every=1, description="")
    for step in range(1, 101):
        synced.update_after_step(step)
    for name, p in policy.named_parameters():
        expected = p.float() + (start[name] - p.float()) * 0.999**100
        torch.testing.assert_close(reference.get_parameter(name).float(), expected, rtol=5e-3, atol=1e-5)


def test_a_reference_that_cannot_follow_is_refused(tmp_path):
    with pytest.raises(ValueError, match="weights of its own"):
        trainer(tmp_path, sync_ref_model=True, kwargs={"peft_config": LoraConfig(**LORA)})
    with pytest.raises(ValueError, match="both need the same parameters"):
        trainer(tmp_path, sync_ref_model=True, kwargs={"ref_model": tiny.causal_lm("qwen2")})
    with pytest.warns(UserWarning, match="Ignored without `sync_ref_model`: ref_model_sync_steps"):
        config(tmp_path, ref_model_sync_steps=3)
