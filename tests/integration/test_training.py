"""Whole runs on tiny real models: they learn, and take betas, callbacks, optimizers and precision from the user."""

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification, TrainerCallback

from online_dpo import OnlineDPOConfig
from support import tiny
from support.training import LENGTHS, dataset, train_logs, trainer, weights


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_learns_to_say_the_rewarded_words(tmp_path, family):
    made = trainer(
        tmp_path,
        model=tiny.causal_lm(family, sharpness=1.0),
        train_dataset=dataset(lengths=LENGTHS * 3),
        per_device_train_batch_size=12,
        learning_rate=1e-2,
        max_steps=12,
        max_grad_norm=1.0,
        beta=0.1,
        gradient_checkpointing=True,
    )
    made.train()
    scores = [log["objective/scores"] for log in train_logs(made)]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.5
    assert train_logs(made)[-1]["objective/kl"] > 0.1


def test_a_reward_model_trains_the_policy_up(tmp_path):
    torch.manual_seed(0)
    reward = LlamaForSequenceClassification(tiny.config("llama", num_labels=1, hidden_size=16)).eval()
    made = trainer(
        tmp_path,
        reward_funcs=reward,
        kwargs={"reward_processing_classes": tiny.tokenizer()},
        learning_rate=1e-2,
        max_steps=10,
        per_device_train_batch_size=12,
    )
    made.train()
    scores = [log["objective/scores"] for log in train_logs(made)]
    assert np.mean(scores[-3:]) > np.mean(scores[:3])
    assert all(p.grad is None for p in reward.parameters())


def test_dropout_is_off_unless_asked_for(tmp_path):
    def model():
        return tiny.causal_lm("gpt2", sharpness=1.0, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)

    off = trainer(tmp_path, model=model())
    off.train()
    assert train_logs(off)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    on = trainer(tmp_path, model=model(), disable_dropout=False)
    on.train()
    assert abs(train_logs(on)[0]["rewards/margins"]) > 1e-3


def test_callbacks_optimizers_and_reports_are_the_users(tmp_path):
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    model = tiny.causal_lm(sharpness=1.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.25)
    made = trainer(tmp_path, model=model, kwargs={"callbacks": [Count()], "optimizers": (sgd, None)}, max_steps=2)
    before = weights(model)
    made.train()
    assert steps == [1, 2] and made.optimizer.optimizer is sgd
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert train_logs(made)[0]["learning_rate"] == 0.25


def test_beta_of_each_epoch_is_the_one_in_the_loss(tmp_path):
    """Where policy and reference agree, IPO's loss is 1 / (2 beta) squared."""
    made = trainer(
        tmp_path,
        per_device_train_batch_size=12,
        max_steps=-1,
        num_train_epochs=2,
        beta=[0.5, 0.25],
        loss_type="ipo",
        learning_rate=1e-12,
    )
    made.train()
    assert [log["loss"] for log in train_logs(made)] == pytest.approx([1.0, 4.0], rel=1e-4)


def test_beta_of_each_epoch(tmp_path):
    made = trainer(tmp_path, per_device_train_batch_size=6, max_steps=-1, num_train_epochs=3, beta=[0.3, 0.7])
    made.train()
    assert [log["beta"] for log in train_logs(made)] == [0.3, 0.3, 0.7, 0.7, 0.7, 0.7]


def test_bf16_mixed_precision_trains_and_stays_close_to_fp32(tmp_path):
    half, full = (trainer(tmp_path, max_steps=2, bf16=on) for on in (True, False))
    for made in (half, full):
        made.train()
    assert train_logs(half)[1]["logps/chosen"] == pytest.approx(train_logs(full)[1]["logps/chosen"], rel=0.2)
    assert train_logs(half)[1]["logps/chosen"] != train_logs(full)[1]["logps/chosen"]


def test_missing_eos_penalty_lowers_unfinished_completions(tmp_path):
    made = trainer(tmp_path, reward_funcs=lambda completions, **_: [0.0] * len(completions), missing_eos_penalty=2.5)
    made.train()
    [log] = train_logs(made)
    assert log["objective/scores"] == pytest.approx(-2.5 * log["completions/clipped_ratio"])
    assert OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True).missing_eos_penalty is None
