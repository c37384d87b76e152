"""The invariants of docs/architecture.md, under their numbers there, on whole optimizer steps of real, tiny models."""

import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from online_dpo import OnlineDPOTrainer
from online_dpo.data.collate import collate_prompts, prompts_from_batch
from online_dpo.errors import NothingTrainedError, ScoringError, TrainingDivergedError
from online_dpo.objective.losses import LOSSES
from online_dpo.pairing.strategies import STRATEGIES
from support import tiny
from support.training import assert_same, config, dataset, gradient, trainer, weights, word_reward


def recording(calls):
    def reward(prompts, completions, completion_ids, name, **_):
        calls.append(list(zip(prompts, completions, completion_ids, name, strict=True)))
        return word_reward(completions)

    return reward


def first_step(made):
    """Micro-batches of the first optimizer step, as `Trainer` would fetch them."""
    loader = made.get_train_dataloader()
    return made.get_batch_samples(iter(loader), made.args.gradient_accumulation_steps, made.args.device)


def sequences(rows):
    """Prompt and completion of every completion, read back from the rows: what a model sees before its first token."""
    tokens, read = rows.tokens, []
    tree, branch, ids = (x.flatten() for x in (tokens.tree_RT, tokens.branch_RT, tokens.ids_RT))
    for source, target in zip(*(x.split(rows.length_S.tolist()) for x in (rows.source_M, rows.target_M)), strict=True):
        before = int(source[0])
        own = (tree == tree[before]) & (branch == 0) & (torch.arange(len(ids)) <= before)
        read.append((tuple(ids[own].tolist()), tuple(target.tolist())))
    return read


# 1 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [None, {"no_repeat_ngram_size": 0}])
@pytest.mark.parametrize("num_completions", [2, 3, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_chosen_and_rejected_share_their_prompt_and_come_from_its_group(tmp_path, num_completions, extra, shared):
    calls = []
    made = trainer(
        tmp_path,
        reward_funcs=recording(calls),
        num_completions=num_completions,
        share_prompts=shared,
        generation_kwargs=extra,
        gradient_accumulation_steps=3,
    )
    micro_batches, _ = first_step(made)
    [scored] = calls
    by_prompt = {}
    for prompt, _, ids, _ in scored:
        by_prompt.setdefault(tuple(made.tokenizer(prompt)["input_ids"]), []).append(tuple(ids))
    assert len(by_prompt) == 12 and all(len(ids) == num_completions for ids in by_prompt.values())
    pairs = 0
    for rows in (rows for inputs in micro_batches for rows in inputs["passes"]):
        assert rows.tokens.shares_prompts is shared
        read = sequences(rows)
        for chosen, rejected in zip(rows.chosen_N.tolist(), rows.rejected_N.tolist(), strict=True):
            prompts, completions = zip(read[chosen], read[rejected], strict=True)
            assert prompts[0] == prompts[1]
            assert completions[0] in by_prompt[prompts[0]] and completions[1] in by_prompt[prompts[0]]
            score = {c: word_reward([made.tokenizer.decode(c, skip_special_tokens=True)])[0] for c in completions}
            assert score[completions[0]] > score[completions[1]]
            pairs += 1
    assert pairs >= 6


@pytest.mark.parametrize("extra", [None, {"no_repeat_ngram_size": 0}])
@pytest.mark.parametrize("num_completions", [2, 3, 5])
def test_each_completion_was_sampled_from_the_prompt_of_its_group(tmp_path, num_completions, extra):
    """The sampler's log-probabilities fit this prompt, and none of the others."""
    made = trainer(tmp_path, num_completions=num_completions, generation_kwargs=extra)
    prompts = prompts_from_batch(collate_prompts([made.train_dataset[i] for i in range(6)]))
    groups = made._sample_and_score(0, prompts)().groups
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        for completion in group.completions:
            gaps = {}
            for prompt in prompts:
                ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
                with torch.no_grad():
                    logps = made.model(ids).logits.log_softmax(-1)[0, len(prompt.token_ids) - 1 : -1]
                picked = logps.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
                gaps[prompt.row] = (picked - torch.tensor(completion.logprobs)).abs().max().item()
            assert gaps.pop(group.prompt.row) < 1e-4 < min(gaps.values())


# 2 ------------------------------------------------------------------------------------------------------------------


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


# 4 ------------------------------------------------------------------------------------------------------------------


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
        logs.append({k: v for k, v in made.state.log_history[0].items() if not k.startswith(("time/", "perf/"))})
    assert logs[0].keys() == logs[1].keys()
    assert logs[0] == pytest.approx(logs[1], rel=1e-5, abs=1e-6)
    assert logs[0]["objective/kl"] != 0 and 0 < logs[0]["completions/clipped_ratio"] < 0.5


# 5 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stop, max_staleness):
    options = dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
        save_strategy="steps",
        save_steps=1,
        disable_dropout=False,
        lr_scheduler_type="linear",
        max_staleness=max_staleness,
    )

    def with_dropout():
        return tiny.causal_lm("gpt2", sharpness=1.0, resid_pdrop=0.2, embd_pdrop=0.2)

    whole = trainer(tmp_path, model=with_dropout(), **options)
    whole.train()
    resumed = trainer(tmp_path, model=with_dropout(), **options)
    torch.rand(17)  # how much randomness was drawn before must not matter
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    for name, expected in weights(whole.model).items():
        assert torch.equal(dict(resumed.model.named_parameters())[name], expected), name
    ours, theirs = resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in theirs for key in theirs[i])
    last = [h["objective/scores"] for h in whole.state.log_history if "objective/scores" in h]
    assert [h["objective/scores"] for h in resumed.state.log_history if "objective/scores" in h] == last


@pytest.mark.slow
@pytest.mark.parametrize("failing_step", [2, 3])
def test_a_run_whose_rewards_failed_goes_on_from_where_it_was(tmp_path, failing_step):
    """Three steps an epoch: one fails in the middle of an epoch, one at its beginning."""
    options = dict(max_steps=5, disable_dropout=False, lr_scheduler_type="linear")
    calls = []

    def failing(completions, **_):
        calls.append(completions)
        if len(calls) == failing_step + 1:
            raise ConnectionError("the reward service is away")
        return word_reward(completions)

    def with_dropout():
        return tiny.causal_lm("gpt2", sharpness=1.0, resid_pdrop=0.2, embd_pdrop=0.2)

    whole = trainer(tmp_path / "whole", model=with_dropout(), **options)
    whole.train()
    failed = trainer(tmp_path / "failed", model=with_dropout(), reward_funcs=failing, **options)
    with pytest.raises(ScoringError, match="the reward service is away"):
        failed.train()
    resumed = trainer(tmp_path / "failed", model=with_dropout(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert len(calls) == failing_step + 1 and resumed.state.global_step == 5
    assert (tmp_path / "failed" / f"checkpoint-{failing_step}").is_dir()
    for name, expected in weights(whole.model).items():
        assert torch.equal(dict(resumed.model.named_parameters())[name], expected), name
    steps = [[h for h in made.state.log_history if "pairs/count" in h] for made in (whole, resumed)]
    assert [h["objective/scores"] for h in steps[0]] == [h["objective/scores"] for h in steps[1]]


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_pairs(tmp_path):
    options = dict(num_completions=4, pair_selection="best_random", max_steps=3, save_strategy="steps", save_steps=1)
    whole = trainer(tmp_path, **options)
    whole.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(p, resumed.model.get_parameter(name)) for name, p in whole.model.named_parameters())
    other = trainer(tmp_path, **{**options, "pair_selection": "best_worst"})
    other.train()
    assert any(not torch.equal(p, other.model.get_parameter(name)) for name, p in whole.model.named_parameters())


@pytest.mark.slow
def test_a_resumed_run_has_the_same_reference(tmp_path):
    """It has followed the policy before the checkpoint, in it, and after it."""
    options = dict(max_steps=5, save_strategy="steps", save_steps=1, learning_rate=0.05, beta=1.0)
    options |= dict(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.3)
    options |= dict(eval_strategy="steps", eval_steps=1)
    whole = trainer(tmp_path, kwargs={"eval_dataset": dataset()}, **options)
    whole.train()
    resumed = trainer(tmp_path, kwargs={"eval_dataset": dataset()}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for ours, theirs in ((resumed.model, whole.model), (resumed.reference.model, whole.reference.model)):
        assert all(torch.equal(p, ours.get_parameter(name)) for name, p in theirs.named_parameters())
    logs = [
        [
            {k: v for k, v in log.items() if k.startswith(("eval_win", "eval_obj", "obj"))}
            for log in made.state.log_history
        ]
        for made in (whole, resumed)
    ]
    assert logs[0] == logs[1]


def test_a_resumed_run_with_a_judge_and_steps_ahead(tmp_path):
    """The preferences of a step that was judged before the checkpoint are part of it."""

    def longer(prompts, pairs, shuffle_order=True):
        return [int(len(second) > len(first)) for first, second in pairs]

    options = dict(num_completions=3, max_staleness=1, max_steps=4, save_strategy="steps", save_steps=1)
    whole = trainer(tmp_path, reward_funcs=None, kwargs={"judge": longer}, **options)
    whole.train()
    resumed = trainer(tmp_path, reward_funcs=None, kwargs={"judge": longer}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, resumed.model.get_parameter(name)) for name, p in whole.model.named_parameters())


# 6 and 12 -----------------------------------------------------------------------------------------------------------


def test_every_prompt_of_an_epoch_ends_as_a_pair_or_in_a_counted_reason(tmp_path):
    def moody(completions, name, **_):
        values = []
        for i, row in enumerate(name):
            kind = int(row.split()[1]) % 4
            values.append({0: float(i), 1: None, 2: float("nan") if i % 2 else 1.0, 3: 7.0}[kind])
        return values

    made = trainer(tmp_path, reward_funcs=moody, per_device_train_batch_size=5, max_steps=-1, num_train_epochs=2)
    made.train()
    totals = Counter()
    for log in made.state.log_history:
        totals.update({k: v for k, v in log.items() if k.startswith("dropped/") or k in ("pairs/count", "prompts")})
    assert totals["prompts"] == 24 and totals["pairs/count"] == 6
    assert totals["dropped/missing_score"] == 12 and totals["dropped/tie"] == 6
    assert totals["pairs/count"] + sum(v for k, v in totals.items() if k.startswith("dropped/")) == totals["prompts"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_prompt_ends_as_pairs_or_in_a_counted_reason_whatever_the_selection(tmp_path, strategy):
    made = trainer(
        tmp_path,
        num_completions=4,
        pair_selection=strategy,
        min_margin=1.5,
        max_margin=4.0,
        max_length_ratio=2.0,
        generation_kwargs={"eos_token_id": [1, 2, 5, 6, 7, 8]},  # completions of many lengths
        max_steps=-1,
        num_train_epochs=2,
    )
    made.train()
    totals = Counter()
    for log in made.state.log_history:
        totals.update({k: v for k, v in log.items() if k.startswith("dropped/") or k in ("pairs/groups", "prompts")})
    assert totals["prompts"] == 24 and totals["pairs/groups"] > 0
    assert totals["dropped/margin"] > 0 or totals["dropped/length_ratio"] > 0
    assert totals["pairs/groups"] + sum(v for k, v in totals.items() if k.startswith("dropped/")) == totals["prompts"]


def test_a_missing_score_does_not_beat_a_bad_one(tmp_path):
    """Incumbent behaviour: None becomes 0 and beats -1. Here no gradient flows from it at all."""
    made = trainer(tmp_path, reward_funcs=lambda completions, **_: [None, -1.0] * (len(completions) // 2))
    before = weights(made.model)
    with pytest.raises(NothingTrainedError, match="missing_score 4"):
        made.train()
    assert all(torch.equal(before[name], p) for name, p in made.model.named_parameters())
    assert made.state.log_history[0]["dropped/missing_score"] == 4


def test_a_step_without_pairs_leaves_weights_and_optimizer_alone(tmp_path):
    """Weight decay and momentum would move them even with a gradient of zero."""
    calls = []

    def only_first_step(completions, **_):
        calls.append(1)
        return [float(i) for i in range(len(completions))] if len(calls) == 1 else [1.0] * len(completions)

    made = trainer(
        tmp_path, reward_funcs=only_first_step, max_steps=2, weight_decay=0.5, save_strategy="steps", save_steps=1
    )
    made.train()
    after_first = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert all(torch.equal(p, made.model.get_parameter(name)) for name, p in after_first.named_parameters())
    assert made.state.log_history[1]["dropped/tie"] == 4


# 7 ------------------------------------------------------------------------------------------------------------------


def test_what_was_sampled_from_is_what_is_scored_and_trained_on(tmp_path):
    calls = []
    made = trainer(
        tmp_path, reward_funcs=recording(calls), train_dataset=dataset(lengths=(30, 31, 5, 32)), max_length=20
    )
    micro_batches, _ = first_step(made)
    assert {len(made.tokenizer(prompt)["input_ids"]) for prompt, *_ in calls[0]} == {12, 5}
    sampled_from = {tuple(made.tokenizer(prompt)["input_ids"]) for prompt, *_ in calls[0]}
    originals = [tuple(made.tokenizer(row["prompt"])["input_ids"]) for row in dataset(lengths=(30, 31, 5, 32))]
    assert sampled_from == {ids[-12:] for ids in originals}
    trained_on = {prompt for inputs in micro_batches for rows in inputs["passes"] for prompt, _ in sequences(rows)}
    assert trained_on and trained_on <= sampled_from


# 9 ------------------------------------------------------------------------------------------------------------------


def test_saved_configs_are_as_the_user_gave_them(tmp_path):
    model = tiny.causal_lm(sharpness=1.0, eos_token_id=[tiny.END], use_cache=True, pad_token_id=None)
    model.generation_config.eos_token_id = [tiny.END]
    model.generation_config.temperature = 0.3
    model.generation_config.do_sample = True
    given = model.config.to_dict(), model.generation_config.to_dict()
    made = trainer(tmp_path, model=model, gradient_checkpointing=True, save_strategy="steps", save_steps=1)
    made.train()
    made.save_model(str(tmp_path / "final"))
    for folder in ("final", "checkpoint-1"):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        generation = json.loads((tmp_path / folder / "generation_config.json").read_text())
        for name in ("eos_token_id", "bos_token_id", "pad_token_id", "use_cache"):
            assert saved.get(name) == given[0].get(name), (folder, name)
        for name in ("eos_token_id", "bos_token_id", "pad_token_id", "temperature", "do_sample"):
            assert generation.get(name) == given[1].get(name), (folder, name)


# 11 -----------------------------------------------------------------------------------------------------------------


def poison(model, at_steps):
    """Makes the log-probabilities of these training forwards NaN (1 is the first)."""
    count = [0]

    def hook(module, args, output):
        if module.training:
            count[0] += 1
            if count[0] in at_steps:
                return output[0] * float("nan"), output[1]
        return None

    model.register_forward_hook(hook)
    return model


def optimizer_state(made):
    return {(i, k): v.clone() for i, s in made.optimizer.state_dict()["state"].items() for k, v in s.items()}


@pytest.mark.parametrize("accumulation, poisoned", [(1, {2}), (2, {3}), (2, {4})])
def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_alone(tmp_path, accumulation, poisoned):
    from transformers import TrainerCallback

    seen = []

    class Snapshot(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((weights(made.model), optimizer_state(made)))

    made = trainer(
        tmp_path,
        model=poison(tiny.causal_lm(sharpness=1.0), poisoned),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
        weight_decay=0.1,
        kwargs={"callbacks": [Snapshot()]},
    )
    made.train()
    for before, after in zip(seen[0], seen[1], strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(not torch.equal(seen[1][0][name], seen[2][0][name]) for name in seen[1][0])
    assert all(p.isfinite().all() for p in made.model.parameters())
    assert [h["guard/skipped_steps"] for h in made.state.log_history if "guard/skipped_steps" in h] == [0, 1, 1]


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(tmp_path):
    made = trainer(
        tmp_path, model=poison(tiny.causal_lm(sharpness=1.0), {2, 4, 5, 6}), max_steps=9, max_skipped_steps=3
    )
    with pytest.raises(TrainingDivergedError, match=r"3 steps in a row.*checkpoint-6"):
        made.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert all(torch.equal(p, made.model.get_parameter(name)) for name, p in saved.named_parameters())


def test_weights_that_are_not_finite_end_in_the_error_that_says_so(tmp_path):
    model = tiny.causal_lm(sharpness=1.0)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(TrainingDivergedError, match="2 steps in a row"):
        trainer(tmp_path, model=model, max_steps=5, max_skipped_steps=2, tie_policy="first").train()


# out of memory ------------------------------------------------------------------------------------------------------


TOKENS_WITH_ROOM = 30


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        if len(gradient) > TOKENS_WITH_ROOM:
            raise torch.OutOfMemoryError("no room for the backward pass")
        return gradient


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_running_out_of_memory_splits_the_micro_batch_and_keeps_the_gradient(tmp_path, where):
    def hook(module, args, output):
        if not module.training:
            return
        logps_M, entropy_M = output
        if where == "forward" and len(logps_M) > TOKENS_WITH_ROOM:
            raise torch.OutOfMemoryError("no room for the forward pass")
        if where == "backward":
            return FailingBackward.apply(logps_M), entropy_M

    options = dict(per_device_train_batch_size=6, gradient_accumulation_steps=2)
    expected_log = trainer(tmp_path, **options)
    expected_log.train()
    expected = gradient(tmp_path, **options)
    model = tiny.causal_lm(sharpness=1.0)
    model.register_forward_hook(hook)
    assert_same(gradient(tmp_path, model=model, **options), expected, 1e-5)

    model = tiny.causal_lm(sharpness=1.0)
    model.register_forward_hook(hook)
    small = trainer(tmp_path, model=model, **options)
    small.train()
    assert small.tokens_that_fit < 100

    def comparable(made):
        return {k: v for k, v in made.state.log_history[0].items() if not k.startswith(("time/", "perf/"))}

    assert comparable(small) == pytest.approx(comparable(expected_log), rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("room", [True, False])
def test_memory_that_sampling_keeps_is_taken_back_when_a_pass_does_not_fit(tmp_path, room):
    def hook(module, args, output):
        if module.training and not room and len(output[0]) > TOKENS_WITH_ROOM:
            raise torch.OutOfMemoryError("no room for the forward pass")

    model = tiny.causal_lm(sharpness=1.0)
    model.register_forward_hook(hook)
    made = trainer(tmp_path, model=model, per_device_train_batch_size=6)
    made.engine.static_steps = True
    made.train()
    assert bool(made.engine._buffers.layers) == room


@pytest.mark.slow
def test_a_single_pair_that_does_not_fit_says_what_to_do(tmp_path):
    def hook(module, args, output):
        if module.training:
            raise torch.OutOfMemoryError("never any room")

    model = tiny.causal_lm(sharpness=1.0)
    model.register_forward_hook(hook)
    with pytest.raises(torch.OutOfMemoryError, match="Lower `max_tokens_per_pass`"):
        trainer(tmp_path, model=model).train()


# randomness ---------------------------------------------------------------------------------------------------------


def test_epochs_and_steps_sample_different_completions(tmp_path):
    calls = []
    made = OnlineDPOTrainer(
        model=tiny.causal_lm(sharpness=1.0),
        reward_funcs=recording(calls),
        args=config(tmp_path, per_device_train_batch_size=12, max_steps=2, learning_rate=1e-12),
        train_dataset=dataset(),
        processing_class=tiny.tokenizer(),
    )
    made.train()
    first, second = ({name: ids for _, _, ids, name in call} for call in calls)
    assert first.keys() == second.keys() and sum(first[n] == second[n] for n in first) <= 2
