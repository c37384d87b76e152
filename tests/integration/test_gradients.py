"""Gradients and metrics do not depend on how a step is cut or padded (invariants 2 and 4)."""

import pytest
import torch

from online_dpo.objective.losses import LOSSES
from online_dpo.pairing.strategies import STRATEGIES
from support import tiny
from support.training import assert_same, dataset, gradient, recording, trainer, without_times, word_reward

# invariant 2 ----------------------------------------------------------------------------------------------------------


def test_gradient_is_the_mean_over_pairs_worked_out_one_sequence_at_a_time(tmp_path):
    """The oracle knows nothing of rows, masks or micro-batches."""
    calls = []
    reference = tiny.causal_lm(seed=5, sharpness=1.0)
    got = gradient(
        tmp_path,
        reward_funcs=recording(calls),
        kwargs={"ref_model": tiny.causal_lm(seed=5, sharpness=1.0)},
        per_device_train_batch_size=12,
        beta=0.5,
    )
    policy, tokenizer = tiny.causal_lm(sharpness=1.0), tiny.tokenizer()

    def logp(model, prompt, ids):
        prompt_ids = tokenizer(prompt)["input_ids"]
        logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()

    losses = []
    for first, second in zip(calls[0][::2], calls[0][1::2], strict=True):
        a, b = word_reward([first[1], second[1]])
        if a == b:
            continue
        good, bad = (first, second) if a > b else (second, first)
        h = logp(policy, good[0], good[2]) - logp(policy, bad[0], bad[2])
        h = h - (logp(reference, good[0], good[2]) - logp(reference, bad[0], bad[2])).detach()
        losses.append(-torch.nn.functional.logsigmoid(0.5 * h))
    assert 6 <= len(losses) < 12
    torch.stack(losses).mean().backward()
    assert_same(got, {name: p.grad for name, p in policy.named_parameters()}, 1e-5)


@pytest.mark.parametrize("batch, accumulation", [(4, 2), (2, 4), (1, 8)])
def test_gradient_does_not_depend_on_accumulation(tmp_path, batch, accumulation):
    whole = gradient(tmp_path, per_device_train_batch_size=8)
    cut = gradient(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    assert_same(cut, whole, 1e-5)


SOFT = dict(label_temperature=2.0, label_smoothing=0.05, beta=0.5)

KINDS = {name: dict(loss_type=name, **SOFT) for name in LOSSES if name != "sft"} | {
    "sft": dict(loss_type="sft"),
    "several": dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], **SOFT),
    "weighted": dict(use_weighting=True, margin_weighting=True, loss_weights=[1e3]),  # weights of e^-8 are usual here
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_losss_gradient_depends_on_the_cut(tmp_path, kind):
    """Soft labels, all pairs of a group, and a reference of its own, so that every part of the formulas counts."""
    options = dict(
        KINDS[kind],
        num_completions=3,
        pair_selection="all_pairs",
        train_dataset=dataset(lengths=(5, 9, 3, 7)),
    )

    def made(**cut):
        return gradient(tmp_path, kwargs={"ref_model": tiny.causal_lm(seed=5, sharpness=1.0)}, **options, **cut)

    cut = made(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_tokens_per_pass=20)
    assert_same(cut, made(per_device_train_batch_size=4, share_prompts=False), 2e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategys_gradient_depends_on_the_cut(tmp_path, strategy):
    options = dict(num_completions=6, pair_selection=strategy)
    whole = gradient(tmp_path, per_device_train_batch_size=8, **options)
    cut = gradient(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert_same(cut, whole, 2e-5)


def test_margin_weights_are_relative_to_the_whole_step(tmp_path):
    """Scores ten times as large, and margins with them, change nothing; the pairs' losses count by their margins."""

    def reward(scale):
        return lambda completions, **_: [scale * x for x in word_reward(completions)]

    options = dict(margin_weighting=True, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    small, large = (gradient(tmp_path, reward_funcs=reward(scale), **options) for scale in (0.1, 10.0))
    assert_same(small, large, 1e-5)
    plain = gradient(tmp_path, reward_funcs=reward(1.0), **{**options, "margin_weighting": False})
    assert sum((small[name] - plain[name]).norm() for name in plain) > 1e-3


@pytest.mark.parametrize("batch, accumulation", [(4, 2), (2, 4)])
def test_a_short_last_accumulation_weighs_its_pairs_the_same(tmp_path, batch, accumulation):
    """12 prompts, 8 a step: the second step of the epoch has 4."""
    both = {}
    for size, steps in ((8, 1), (batch, accumulation)):
        both[size] = gradient(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            learning_rate=0.1,
        )
    assert_same(both[batch], both[8], 1e-5)


def test_gradient_checkpointing_does_not_change_the_gradient(tmp_path):
    assert_same(gradient(tmp_path, gradient_checkpointing=True), gradient(tmp_path), 1e-5)


def test_micro_batches_without_pairs_change_nothing(tmp_path):
    """One pair in the whole step, eight micro-batches: seven of them hold a stand-in."""

    def only_row_three(completions, name, **_):
        return [float(i) if n == "row 3" else None for i, n in enumerate(name)]

    options = dict(reward_funcs=only_row_three, train_dataset=dataset(lengths=(5, 9, 3, 7, 12, 4, 6, 8)))
    whole = gradient(tmp_path, per_device_train_batch_size=8, **options)
    cut = gradient(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    assert_same(cut, whole, 1e-5)


# invariant 4 ----------------------------------------------------------------------------------------------------------


def test_no_metric_depends_on_padding_or_on_the_cut(tmp_path):
    """One long prompt pads all rows of its batch; cut into single prompts nothing is padded."""
    logs = []
    for batch, accumulation in ((8, 1), (1, 8)):
        made = trainer(
            tmp_path,
            train_dataset=dataset(lengths=(2, 50, 3, 4, 2, 5, 3, 2)),
            kwargs={"ref_model": tiny.causal_lm(seed=5, sharpness=1.0)},
            generation_kwargs={"eos_token_id": [1, 2, 5, 6, 7, 8, 9, 10]},  # completions of many lengths
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        made.train()
        logs.append(without_times(made.state.log_history[0]))
    assert logs[0].keys() == logs[1].keys()
    assert logs[0] == pytest.approx(logs[1], rel=1e-5, abs=1e-6)
    assert logs[0]["objective/kl"] != 0 and 0 < logs[0]["completions/clipped_ratio"] < 0.5
