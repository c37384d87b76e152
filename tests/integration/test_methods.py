"""XPO, Nash-MD and the beta that adapts, in whole runs of tiny models."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from online_dpo.modeling.reference import AdapterOffReference
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey
from online_dpo.types import Completion
from support import tiny
from support.training import (
    LENGTHS,
    LORA,
    assert_same,
    config,
    dataset,
    gradient,
    step_logs,
    trainer,
    weights,
    without_times,
    word_reward,
)

XPO = dict(method="xpo", xpo_alpha=0.01)
NASH = dict(method="nash_md", mixture_coef=0.25, temperature=1.0)
METHODS = {"xpo": XPO, "nash_md": NASH}


def other_reference():
    return tiny.causal_lm(seed=5, sharpness=1.0)


class Longer:
    """Judges of two texts by how many of the rewarded words they have, with a probability."""

    name = "longer"

    def prefer(self, comparisons):
        made = [word_reward([c.text for c in comparison.completions]) for comparison in comparisons]
        return [float(1 / (1 + np.exp(b - a))) for a, b in made]


# learning -------------------------------------------------------------------------------------------------------------

LARGE_LORA = LoraConfig(**{**LORA, "r": 8, "lora_alpha": 32, "target_modules": "all-linear"})
LEARNING = {
    "xpo": dict(XPO, learning_rate=1e-2),
    "xpo, an adapter": dict(XPO, learning_rate=2e-2, kwargs={"peft_config": LARGE_LORA}),
    "xpo, a judge": dict(XPO, learning_rate=1e-2, reward_funcs=None, kwargs={"judge": Longer()}),
    "xpo, steps ahead": dict(XPO, learning_rate=1e-2, max_staleness=1),
    "nash_md": dict(NASH, learning_rate=2e-2, beta=0.01),
    "nash_md, an adapter": dict(NASH, learning_rate=2e-2, beta=0.01, kwargs={"peft_config": LARGE_LORA}),
    "nash_md, a judge": dict(NASH, learning_rate=2e-2, beta=0.01, reward_funcs=None, kwargs={"judge": Longer()}),
    "nash_md, the policy alone": dict(NASH, learning_rate=2e-2, beta=0.01, mixture_coef=0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEARNING)
def test_the_policy_learns_to_say_the_rewarded_words(tmp_path, kind):
    data = dataset(lengths=LENGTHS * 3)
    options = dict(per_device_train_batch_size=36, max_steps=14, max_grad_norm=1.0, train_dataset=data)
    model = tiny.causal_lm(sharpness=3.0 if "adapter" in kind else 1.0)
    made = trainer(tmp_path, model=model, **options, **LEARNING[kind])
    scores = []

    def watched(groups, assessment, step, form=made.collector.form_pairs):
        scores.append(np.mean([word_reward([group.completions[0].text]) for group in groups]))
        return form(groups, assessment, step)

    made.collector.form_pairs = watched
    made.train()
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.5
    logs = step_logs(made)
    if "alone" not in kind:
        assert logs[-1]["opponent/win_rate"] > logs[0]["opponent/win_rate"] + 0.05
    assert logs[-1]["objective/kl"] > 0.1


# what is sampled ------------------------------------------------------------------------------------------------------


def feedback_of(made, step=0):
    prompts = tiny.prompts(LENGTHS)
    _, answer = made.collector.sample_and_assess(step, prompts)
    return answer().groups, prompts


def test_xpos_groups_hold_what_the_policy_and_the_reference_would_say_alone(tmp_path):
    made = trainer(tmp_path, kwargs={"ref_model": other_reference()}, **XPO)
    groups, prompts = feedback_of(made, step=3)
    own = made.sampler.engine.generate(prompts, 1, made.sampler.params, RolloutKey(42, 3, 0))
    reference = TransformersEngine(other_reference(), tiny.tokenizer())
    theirs = reference.generate(prompts, 1, made.sampler.params, RolloutKey(42, 3, 5))
    for group, mine, other in zip(groups, own, theirs, strict=True):
        assert group.completions[0] == mine.completions[0]
        assert group.completions[1].token_ids == other.completions[0].token_ids
        assert [c.author for c in group.completions] == ["policy", "reference"]
    assert any(g.completions[0].token_ids != g.completions[1].token_ids for g in groups)


def test_xpos_opponent_with_an_adapter_is_the_policy_without(tmp_path):
    made = trainer(tmp_path, kwargs={"peft_config": LoraConfig(**LORA)}, max_steps=2, learning_rate=0.5, **XPO)
    made.train()
    assert isinstance(made.reference, AdapterOffReference)
    groups, prompts = feedback_of(made, step=3)
    base = TransformersEngine(tiny.causal_lm(sharpness=1.0), tiny.tokenizer())
    theirs = base.generate(prompts, 1, made.sampler.params, RolloutKey(42, 3, 5))
    assert [g.completions[1].token_ids for g in groups] == [g.completions[0].token_ids for g in theirs]
    own = base.generate(prompts, 1, made.sampler.params, RolloutKey(42, 3, 0))
    assert [g.completions[0].token_ids for g in groups] != [g.completions[0].token_ids for g in own]


def test_the_share_of_the_reference_goes_by_epochs(tmp_path):
    """0 in the first epoch: a mixture that is the policy; 1 in the second: the reference."""
    options = dict(NASH, mixture_coef=[0.0, 1.0], kwargs={"ref_model": other_reference()})
    made = trainer(tmp_path, **options)
    for epoch, model in ((0.5, made.policy), (1.0, other_reference())):
        made.state.epoch = epoch
        groups, prompts = feedback_of(made)
        engine = TransformersEngine(model, tiny.tokenizer())
        theirs = engine.generate(prompts, 1, made.sampler.params, RolloutKey(42, 0, 5))
        assert [g.completions[1].token_ids for g in groups] == [g.completions[0].token_ids for g in theirs]
        assert {g.completions[1].author for g in groups} == {"mixture"}


def test_xpo_with_an_engine_that_samples_beside_training(tmp_path):
    """Its thread answers for the policy; the reference has answered before, in the thread that trains."""
    import threading

    threads = []

    class Beside(TransformersEngine):
        overlaps = True

        def generate(self, prompts, num_completions, params, key):
            threads.append((type(self).__name__, threading.current_thread() is threading.main_thread()))
            return super().generate(prompts, num_completions, params, key)

        def sync(self, model, version):
            self.model.load_state_dict(model.state_dict())
            self.version = version

    class Watched(Beside):
        pass

    made = trainer(tmp_path, max_steps=3, max_staleness=1, **XPO)
    made.sampler.engine = Beside(tiny.causal_lm(sharpness=1.0), tiny.tokenizer())
    made.opponent._engine.__class__ = Watched
    made.train()
    assert set(threads) == {("Beside", False), ("Watched", True)}
    assert [log["prompts"] for log in step_logs(made)] == [4, 4, 4]


# the gradient ---------------------------------------------------------------------------------------------------------


def recorded(calls):
    def reward(completions, completion_ids, prompts, **_):
        calls.append(list(zip(prompts, completions, completion_ids, strict=True)))
        return word_reward(completions)

    return reward


def test_gradients_are_those_of_the_formulas_worked_out_one_sequence_at_a_time(tmp_path):
    for name, options in METHODS.items():
        calls = []
        got = gradient(
            tmp_path,
            reward_funcs=recorded(calls),
            kwargs={"ref_model": other_reference()},
            per_device_train_batch_size=12,
            beta=0.05,
            **options,
        )
        policy, reference, tokenizer = tiny.causal_lm(sharpness=1.0), other_reference(), tiny.tokenizer()

        def logp(model, prompt, ids, tokenizer=tokenizer):
            prompt_ids = tokenizer(prompt)["input_ids"]
            logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1]
            return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()

        losses = []
        for (prompt, own, own_ids), (_, theirs, their_ids) in zip(calls[0][::2], calls[0][1::2], strict=True):
            a, b = word_reward([own, theirs])
            mine, other = logp(policy, prompt, own_ids), logp(policy, prompt, their_ids)
            ratio = mine - logp(reference, prompt, own_ids).detach()
            if name == "nash_md":
                probability = torch.sigmoid(torch.tensor(a - b))
                losses.append(-(probability - 0.5 - 0.05 * ratio.detach()) * mine)
            elif a != b:
                h = ratio - (other - logp(reference, prompt, their_ids).detach())
                losses.append(-torch.nn.functional.logsigmoid(0.05 * (h if a > b else -h)) + 0.01 * other)
        assert (len(losses) == 12) is (name == "nash_md")  # ties stay
        torch.stack(losses).mean().backward()
        assert_same(got, {name: p.grad for name, p in policy.named_parameters()}, 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", [False, True])
def test_the_gradient_does_not_depend_on_the_cut(tmp_path, method, adapter):
    def made(**cut):
        kwargs = {"peft_config": LoraConfig(**LORA)} if adapter else {"ref_model": other_reference()}
        return gradient(tmp_path, kwargs=kwargs, label_temperature=2.0, **METHODS[method], **cut)

    cut = made(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_tokens_per_pass=20)
    assert_same(cut, made(per_device_train_batch_size=8, share_prompts=False), 2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_no_metric_depends_on_padding_or_on_the_cut(tmp_path, method):
    logs = []
    for batch, accumulation in ((8, 1), (1, 8)):
        made = trainer(
            tmp_path,
            train_dataset=dataset(lengths=(2, 50, 3, 4, 2, 5, 3, 2)),
            kwargs={"ref_model": other_reference()},
            generation_kwargs={"eos_token_id": [1, 2, 5, 6, 7, 8, 9, 10]},  # completions of many lengths
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            learning_rate=0.05,
            optim="sgd",
            target_kl=0.5,
            **METHODS[method],
        )
        made.train()
        logs.append([without_times(log) for log in step_logs(made)])
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys() and ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert logs[0][1]["objective/kl"] != 0 and "opponent/win_rate" in logs[0][1]
    assert logs[0][1]["beta"] != logs[0][0]["beta"]


# resuming -------------------------------------------------------------------------------------------------------------

RESUMED = {
    "xpo": dict(XPO, xpo_alpha=[0.01, 0.2], kwargs={}),
    "xpo, steps ahead": dict(XPO, max_staleness=1),
    "xpo, a reference that follows": dict(XPO, sync_ref_model=True, ref_model_sync_steps=2),
    "nash_md": dict(NASH, mixture_coef=[0.2, 0.8]),
    "target_kl": dict(target_kl=0.5, beta_gain=3.0),
    "nash_md, target_kl": dict(NASH, target_kl=0.5, beta_gain=3.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, kind, stop):
    """Three steps an epoch, so that a list by epochs changes in the middle."""
    options = dict(max_steps=5, save_strategy="steps", save_steps=1, learning_rate=0.02, disable_dropout=False)
    options |= RESUMED[kind]

    def with_dropout():
        return tiny.causal_lm("gpt2", sharpness=1.0, resid_pdrop=0.2, embd_pdrop=0.2)

    whole = trainer(tmp_path, model=with_dropout(), **options)
    whole.train()
    resumed = trainer(tmp_path, model=with_dropout(), **options)
    torch.rand(17)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    for name, expected in weights(whole.model).items():
        assert torch.equal(resumed.model.get_parameter(name), expected), name
    ours, theirs = ([without_times(log) for log in step_logs(made)] for made in (resumed, whole))
    assert ours == theirs
    if "target_kl" in kind:
        assert len({log["beta"] for log in theirs}) == 5


def test_what_was_begun_before_there_were_authors_is_the_policys(tmp_path):
    """A step begun by an earlier version stands in its checkpoint as objects without the field."""
    made = trainer(tmp_path)
    completion = Completion((5, 1), (-1.0, -2.0), "stop", 0, "w1")
    vars(completion).pop("author")
    assert completion.by_policy and made.objective.pack(made.model, [], 1)


# target_kl ------------------------------------------------------------------------------------------------------------


def test_beta_follows_the_kl_of_each_step_by_hand(tmp_path):
    made = trainer(tmp_path, max_steps=8, learning_rate=0.02, beta=0.3, target_kl=0.5, beta_gain=2.0)
    made.train()
    logs = step_logs(made)
    expected = 0.3
    for log in logs:
        assert log["beta"] == pytest.approx(expected, rel=1e-12)
        error = min(max(log["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        expected *= 1 + 2.0 * error
    errors = {round(log["objective/kl"] / 0.5 - 1, 6) for log in logs}
    assert min(errors) < -0.2 and max(errors) > 0.2
    assert [log["rewards/margins"] for log in logs][0] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_kl_is_held_where_it_is_wanted(tmp_path):
    """Without it the policy runs away; with it the KL stays near the target, by a beta that has grown."""

    def later_words(completions, **_):
        return [sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) / 39 for text in completions]

    def kl_and_beta(**fields):
        made = trainer(
            tmp_path,
            reward_funcs=later_words,
            train_dataset=dataset(lengths=LENGTHS * 3),
            per_device_train_batch_size=12,
            max_steps=90,
            learning_rate=5e-3,
            max_grad_norm=1.0,
            label_temperature=0.5,
            **fields,
        )
        made.train()
        logs = step_logs(made)[-30:]
        return np.mean([log["objective/kl"] for log in logs]), np.mean([log["beta"] for log in logs])

    free, _ = kl_and_beta(beta=0.1)
    held, beta = kl_and_beta(beta=0.1, target_kl=3.0, beta_gain=1.0)
    assert free > 15 and 2 < held < 7 and 0.3 < beta <= 1.0


def test_a_run_begins_to_adapt_where_it_is_resumed_with_a_target(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=1, learning_rate=0.02)
    trainer(tmp_path, **options).train()
    assert not (tmp_path / "checkpoint-2" / "beta.json").exists()
    resumed = trainer(tmp_path, target_kl=0.5, beta=0.3, resume_anyway=True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    betas = [log["beta"] for log in step_logs(resumed)][-2:]
    assert betas[0] == 0.3 and betas[1] != 0.3
    saved = json.loads((tmp_path / "checkpoint-3" / "beta.json").read_text())
    assert saved == {"kind": "AdaptedBeta", "beta": betas[1]}


# evaluation and files -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_is_of_the_policy_alone_and_changes_nothing(tmp_path, method):
    runs = []
    for evaluates in ("no", "steps"):
        made = trainer(
            tmp_path,
            max_steps=3,
            eval_strategy=evaluates,
            eval_steps=1,
            learning_rate=0.02,
            kwargs={"eval_dataset": dataset(lengths=(4, 5, 6, 7))},
            save_strategy="steps",
            save_steps=3,
            **METHODS[method],
        )
        made.train()
        runs.append(weights(made.model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    metrics = made.evaluate()
    assert 0 <= metrics["eval_win_rate"] <= 1 and np.isfinite(metrics["eval_loss"])
    prompts = tiny.prompts((4, 5, 6, 7))
    groups = made.sampler.engine.generate(prompts, 2, made.sampler.params, RolloutKey(42, 0, 1))
    assert metrics["eval_objective/scores"] == pytest.approx(
        np.mean([word_reward([c.text])[0] for g in groups for c in g.completions])
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(p, made.model.get_parameter(name)) for name, p in saved.named_parameters())
    assert f'"method": "{method}"' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_prompt_ends_as_a_pair_or_in_a_counted_reason(tmp_path, method):
    def moody(completions, name, **_):
        return [None if int(n.split()[1]) % 3 == 0 else x for n, x in zip(name, word_reward(completions), strict=True)]

    made = trainer(tmp_path, reward_funcs=moody, max_steps=-1, num_train_epochs=1, **METHODS[method])
    made.train()
    logs = step_logs(made)
    totals = {name: sum(log.get(name, 0) for log in logs) for log in logs for name in log}
    dropped = {name: value for name, value in totals.items() if name.startswith("dropped/") and value}
    assert totals["prompts"] == 12 == totals["pairs/count"] + sum(dropped.values())
    assert dropped["dropped/missing_score"] == 4 and ("dropped/tie" in dropped) is (method == "xpo")


# what cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(method="ppo"), "one of online_dpo, xpo, nash_md"),
        (dict(XPO, num_completions=4), "`num_completions` must be 2; it is 4"),
        (dict(XPO, xpo_alpha=-1.0), "`xpo_alpha` must be 0 or more"),
        (dict(XPO, xpo_alpha=[]), "`xpo_alpha` must be 0 or more"),
        (dict(XPO, loss_type="simpo", reference_free=True), "needs a reference"),
        (dict(NASH, mixture_coef=1.5), r"`mixture_coef` must be in \[0, 1\]"),
        (dict(NASH, loss_type="ipo"), "needs `loss_type` to be 'sigmoid': its loss is a policy gradient"),
        (dict(NASH, max_staleness=1), "needs completions of the present policy"),
        (dict(NASH, use_vllm=True), "vLLM cannot sample from a mixture"),
        (dict(NASH, resample_rounds=1), "picked by their scores would be biased"),
        (dict(NASH, tie_policy="first"), "a tie is a probability of one half"),
        (dict(NASH, min_margin=0.5), "would be biased"),
        (dict(NASH, generation_kwargs={"no_repeat_ngram_size": 2}), "must not hold `no_repeat_ngram_size`"),
        (dict(target_kl=0.0), "`target_kl` must be above 0"),
        (dict(target_kl=1.0, beta_gain=5.0), "`beta_gain` must be above 0 and below 5"),
        (dict(target_kl=1.0, beta_range=1.0), "`beta_range` must be above 1"),
        (dict(target_kl=1.0, beta=[0.1, 0.2]), "cannot be a list by epochs"),
        (dict(target_kl=1.0, loss_type=["simpo", "sft"]), "reads no reference"),
    ],
)
def test_wrong_configurations_say_what_to_do(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


def test_fields_that_are_not_read_and_samples_of_another_distribution_give_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="Ignored without `method='xpo'`: xpo_alpha"):
        config(tmp_path, xpo_alpha=[0.1, 0.2])
    with pytest.warns(UserWarning, match="Ignored without `method='nash_md'`: mixture_coef"):
        config(tmp_path, mixture_coef=0.1, method="xpo")
    with pytest.warns(UserWarning, match="Ignored without `target_kl`: beta_gain"):
        config(tmp_path, beta_gain=1.0)
    with pytest.warns(UserWarning, match="Set `temperature` to 1.0, `top_k` to 0"):
        config(tmp_path, method="nash_md", generation_kwargs={"top_k": 5})


def test_lists_by_epochs_need_epochs(tmp_path):
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(lambda: iter(dataset().to_list()))
    with pytest.raises(ValueError, match="A list of `mixture_coef`s"):
        trainer(tmp_path, train_dataset=stream, **{**NASH, "mixture_coef": [0.1, 0.2]})
