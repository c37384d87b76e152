"""What users do with the trainer, on tiny real models."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, TrainerCallback

from online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from online_dpo.data.collate import prompts_from_batch
from online_dpo.errors import InvalidPromptError, RolloutServerError, ScoringError
from online_dpo.modeling.reference import AdapterOffReference, SyncedReference
from online_dpo.rollout.params import RolloutKey
from online_dpo.types import Scores
from support import tiny
from support.training import LENGTHS, config, dataset, gradient, trainer, weights, word_reward


def train_logs(made):
    return [log for log in made.state.log_history if "loss" in log]


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


# judges -------------------------------------------------------------------------------------------------------------


class LongerIsBetter:
    def __init__(self):
        self.prompts, self.pairs = [], []

    def judge(self, prompts, completion_pairs, shuffle_order=True):
        self.prompts += prompts
        self.pairs += completion_pairs
        lengths = [(len(a.split()), len(b.split())) for a, b in completion_pairs]
        return [-1 if a == b else int(b > a) for a, b in lengths]


@pytest.mark.parametrize("as_callable", [False, True])
def test_a_judge_picks_the_pairs(tmp_path, as_callable):
    judge = LongerIsBetter()
    made = trainer(
        tmp_path,
        reward_funcs=None,
        kwargs={"judge": judge.judge if as_callable else judge},
        per_device_train_batch_size=12,
        model=tiny.causal_lm(sharpness=1.0, eos_token_id=[1, 5, 6, 7, 8]),
    )
    made.sampling = made.sampling.__class__(**{**made.sampling.__dict__, "end_token_ids": (1, 5, 6, 7, 8)})
    made.train()
    [log] = train_logs(made)
    undecided = sum(len(a.split()) == len(b.split()) for a, b in judge.pairs)
    assert len(judge.prompts) == 12 and 0 < undecided < 12
    assert log["dropped/no_answer"] == undecided and log["pairs/count"] == 12 - undecided
    assert log["completions/chosen_minus_rejected_length"] > 0
    assert "objective/scores" not in log and "objective/rlhf_reward" not in log


@pytest.mark.parametrize("num_completions", [3, 4, 5])
def test_a_judge_finds_best_and_worst_of_several(tmp_path, num_completions):
    judge = LongerIsBetter()
    ends = (1, 5, 6, 7, 8, 9, 10, 11, 12)
    made = trainer(
        tmp_path,
        reward_funcs=None,
        kwargs={"judge": judge, "eval_dataset": dataset()},
        num_completions=num_completions,
        per_device_train_batch_size=12,
        model=tiny.causal_lm(sharpness=1.0, eos_token_id=list(ends)),
    )
    made.sampling = made.sampling.__class__(**{**made.sampling.__dict__, "end_token_ids": ends})
    made.train()
    [log] = train_logs(made)
    assert log["judge/duels"] == len(judge.pairs) <= 12 * (math.ceil(3 * num_completions / 2) - 1)
    undecided = sum(len(a.split()) == len(b.split()) for a, b in judge.pairs)
    assert log["judge/unanswered_ratio"] == pytest.approx(undecided / len(judge.pairs))
    dropped = sum(value for name, value in log.items() if name.startswith("dropped/"))
    assert 0 < log["pairs/count"] == 12 - dropped
    assert log["completions/chosen_minus_rejected_length"] > 2
    assert 0 < made.evaluate()["eval_win_rate"] < 1


def test_what_a_judge_cannot_do_is_refused(tmp_path):
    for fields in (dict(pair_selection="all_pairs"), dict(min_margin=1.0), dict(label_temperature=1.0)):
        with pytest.raises(ValueError, match="needs scores"):
            trainer(tmp_path, reward_funcs=None, kwargs={"judge": LongerIsBetter()}, **fields)


def test_completions_that_did_not_end_lose_before_a_judge(tmp_path):
    """The judge would always take the first; the penalty is larger than its certainty."""
    made = trainer(
        tmp_path,
        reward_funcs=None,
        kwargs={"judge": lambda prompts, pairs, shuffle_order=True: [0] * len(pairs)},
        missing_eos_penalty=50.0,
        generation_kwargs={"eos_token_id": [1, 2, 5, 6, 7, 8]},
        per_device_train_batch_size=12,
    )
    groups = made._sample_and_score(0, [p for b in made.get_train_dataloader() for p in prompts_from_batch(b)])()
    ended = [[c.finish_reason == "stop" for c in group.completions] for group in groups.groups]
    chosen = [preference.chosen for preference in groups.said.preferences]
    assert [False, True] in ended and chosen == [int(e == [False, True]) for e in ended]


def test_they_lose_in_evaluation_as_well(tmp_path):
    made = trainer(
        tmp_path,
        reward_funcs=None,
        kwargs={"judge": lambda prompts, pairs, shuffle_order=True: [0] * len(pairs), "eval_dataset": dataset()},
        missing_eos_penalty=50.0,
        generation_kwargs={"eos_token_id": [1, 2, 5, 6, 7, 8]},
    )
    metrics = made.evaluate()
    prompts = tiny.prompts(LENGTHS)
    ours = made.engine.generate(prompts, 2, made.sampling, RolloutKey(42, 0, 1))
    expected = []
    for group, rival in zip(ours, made._rivals(prompts), strict=True):
        mine, theirs = (g.completions[0].finish_reason == "stop" for g in (group, rival))
        expected.append(0.0 if theirs and not mine else 1.0)
    assert 0.0 in expected and metrics["eval_win_rate"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_a_judge_sees_conversations_through_the_chat_template(tmp_path):
    judge = LongerIsBetter()
    rows = [{"prompt": [{"role": "user", "content": p.content}]} for p in tiny.prompts([3] * 4)]
    OnlineDPOTrainer(
        model=tiny.causal_lm(sharpness=1.0),
        judge=judge,
        args=config(tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(chat=True),
    ).train()
    assert sorted(judge.prompts) == sorted(f"<unk> {row['prompt'][0]['content']} w0 " for row in rows)


def test_both_a_judge_and_a_reward_warn_and_use_the_reward(tmp_path):
    judge = LongerIsBetter()
    with pytest.warns(UserWarning, match="the reward is used"):
        made = trainer(tmp_path, kwargs={"judge": judge})
    made.train()
    assert not judge.prompts and "scores/word_reward" in train_logs(made)[0]


# adapters -----------------------------------------------------------------------------------------------------------

LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("pre_wrapped", [False, True])
def test_an_adapter_is_trained_and_switched_off_for_the_reference(tmp_path, pre_wrapped):
    base = tiny.causal_lm(sharpness=1.0)
    before = weights(base)
    model = get_peft_model(base, LoraConfig(**LORA)) if pre_wrapped else base
    made = trainer(
        tmp_path,
        model=model,
        kwargs={} if pre_wrapped else {"peft_config": LoraConfig(**LORA)},
        max_steps=3,
        learning_rate=0.05,
        per_device_train_batch_size=12,
        gradient_checkpointing=True,
    )
    assert isinstance(made.reference, AdapterOffReference)
    made.train()
    logs = train_logs(made)
    assert logs[0]["objective/kl"] == pytest.approx(0, abs=1e-5) and abs(logs[2]["objective/kl"]) > 1e-3
    unwrapped = made.model.get_base_model()
    for name, value in before.items():
        wrapped = (
            name.replace("_proj.weight", "_proj.base_layer.weight") if ("q_proj" in name or "v_proj" in name) else name
        )
        assert torch.equal(unwrapped.get_parameter(wrapped), value), name
    with made.reference.active() as reference:
        ids = torch.arange(4, 12)[None]
        torch.testing.assert_close(reference(ids).logits, tiny.causal_lm(sharpness=1.0)(ids).logits)

    made.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(tiny.causal_lm(sharpness=1.0), tmp_path / "final").eval()
    torch.testing.assert_close(loaded(ids).logits, made.model.eval()(ids).logits)


def test_gradient_checkpointing_does_not_change_an_adapters_gradient(tmp_path):
    def adapters(checkpointing):
        torch.manual_seed(3)
        model = get_peft_model(tiny.causal_lm(sharpness=1.0), LoraConfig(**LORA, init_lora_weights=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gradient(tmp_path, model=model, gradient_checkpointing=checkpointing)

    on, off = adapters(True), adapters(False)
    assert on.keys() == off.keys() and all("lora" in name for name in on)
    for name in off:
        torch.testing.assert_close(on[name], off[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chosen", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_with_virtual_tokens_are_refused(tmp_path, chosen):
    """Their positions depend on padding: the same tokens get other log-probabilities in another batch."""
    with pytest.raises(ValueError, match="virtual tokens.*LoRA"):
        trainer(tmp_path, kwargs={"peft_config": chosen(task_type="CAUSAL_LM", num_virtual_tokens=4)})


def test_an_adapter_that_was_trained_before_is_pointed_out(tmp_path, caplog):
    model = get_peft_model(tiny.causal_lm(), LoraConfig(**LORA, init_lora_weights=False))
    trainer(tmp_path, model=model)
    assert "has been trained before" in caplog.text
    caplog.clear()
    trainer(tmp_path, model=get_peft_model(tiny.causal_lm(), LoraConfig(**LORA)))
    assert "has been trained before" not in caplog.text


# the reference ------------------------------------------------------------------------------------------------------


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
    rivals = follows.engine.__class__(start, follows.tokenizer).generate(
        tiny.prompts(LENGTHS), 1, follows.sampling, RolloutKey(42, 0, 2)
    )
    kept = [follows.reference_completions[group.prompt.row, group.prompt.token_ids] for group in rivals]
    assert [c[0].token_ids for c in kept] == [group.completions[0].token_ids for group in rivals]


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


def test_dropout_is_off_unless_asked_for(tmp_path):
    def model():
        return tiny.causal_lm("gpt2", sharpness=1.0, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)

    off = trainer(tmp_path, model=model())
    off.train()
    assert train_logs(off)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    on = trainer(tmp_path, model=model(), disable_dropout=False)
    on.train()
    assert abs(train_logs(on)[0]["rewards/margins"]) > 1e-3


def test_random_pairs_depend_on_seed_step_and_row_and_on_nothing_else(tmp_path):
    made = trainer(
        tmp_path, num_completions=6, pair_selection="best_random", reward_funcs=lambda completions, **_: [0.0]
    )
    groups = [tiny.group(p, [[5 + k, 1] for k in range(6)]) for p in tiny.prompts([3] * 40)]
    said = Scores([[5.0, 0.0, 1.0, 2.0, 3.0, 4.0]] * 40, {})

    def rejected(groups, step):
        pairs = made._form_pairs(groups, Scores(said.values[: len(groups)], {}), step).pairs
        return {pair.group.prompt.row: pair.rejected for pair in pairs}

    first, second = rejected(groups, 0), rejected(groups, 1)
    assert set(first.values()) == {1, 2, 3, 4, 5} and first == rejected(groups[::-1], 0)
    assert rejected(groups[7:9], 0) == {row: first[row] for row in (7, 8)}
    assert sum(first[row] == second[row] for row in first) < 20
    made.args.seed = 43
    assert rejected(groups, 0) != first


# evaluation ---------------------------------------------------------------------------------------------------------


def test_evaluation_numbers_against_an_independent_count(tmp_path):
    made = trainer(
        tmp_path,
        kwargs={"ref_model": tiny.causal_lm(seed=5, sharpness=1.0), "eval_dataset": dataset()},
        num_completions=3,
        per_device_eval_batch_size=5,
    )
    metrics = made.evaluate()
    prompts = tiny.prompts(LENGTHS)
    ours = made.engine.generate(prompts, 3, made.sampling, RolloutKey(42, 0, 1))
    with made.reference.active() as reference:
        theirs = made.engine.__class__(reference, made.tokenizer).generate(
            prompts, 1, made.sampling, RolloutKey(42, 0, 2)
        )
        kls, wins, scores = [], [], []
        for mine, rival in zip(ours, theirs, strict=True):
            rival_score = word_reward([rival.completions[0].text])[0]
            for completion in mine.completions:
                score = word_reward([completion.text])[0]
                scores.append(score)
                wins.append(1.0 if score > rival_score else 0.5 if score == rival_score else 0.0)
                ids = torch.tensor([[*mine.prompt.token_ids, *completion.token_ids]])
                with torch.no_grad():
                    both = [
                        m(ids).logits.log_softmax(-1)[0, len(mine.prompt.token_ids) - 1 : -1]
                        for m in (made.model, reference)
                    ]
                picked = [x.gather(-1, torch.tensor(completion.token_ids)[:, None]).sum().item() for x in both]
                kls.append(picked[0] - picked[1])
    assert metrics["eval_objective/scores"] == pytest.approx(np.mean(scores))
    assert metrics["eval_win_rate"] == pytest.approx(np.mean(wins))
    assert metrics["eval_objective/kl"] == pytest.approx(np.mean(kls), abs=1e-4)
    assert metrics["eval_win_rate_ci95_low"] < metrics["eval_win_rate"] < metrics["eval_win_rate_ci95_high"]
    assert metrics["eval_prompts"] == 12 and metrics["eval_loss"] > 0


def test_evaluation_repeats_exactly_and_leaves_training_alone(tmp_path):
    plain = trainer(tmp_path, max_steps=3)
    plain.train()
    watched = trainer(
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        kwargs={"eval_dataset": {"first": dataset(lengths=(3, 4)), "second": dataset(lengths=(5, 6, 7))}},
    )
    watched.train()
    for name, value in weights(plain.model).items():
        assert torch.equal(watched.model.get_parameter(name), value)
    evals = [log for log in watched.state.log_history if "eval_second_win_rate" in log]
    assert len(evals) == 4 and {log["eval_second_prompts"] for log in evals} == {3.0}
    again = watched.evaluate()
    assert again["eval_first_objective/scores"] == watched.evaluate()["eval_first_objective/scores"]
    assert again["eval_second_win_rate"] == evals[-1]["eval_second_win_rate"]


def test_the_same_prompt_in_two_evaluation_sets_is_scored_with_each_sets_own_columns(tmp_path):
    calls = []

    def keep_labels(completions, label, **_):
        calls.append(label)
        return [0.0] * len(completions)

    data = {name: dataset(lengths=(3,), label=[name]) for name in ("a", "b")}
    train = dataset(label=["train"] * len(LENGTHS))
    made = trainer(tmp_path, reward_funcs=keep_labels, train_dataset=train, kwargs={"eval_dataset": data})
    made.evaluate()
    assert calls == [["a", "a"], ["a"], ["b", "b"], ["b"]]


def test_an_untrained_policy_has_no_distance_to_its_reference_in_half_precision_either(tmp_path):
    made = trainer(tmp_path, bf16=True, kwargs={"eval_dataset": dataset()})
    assert made.evaluate()["eval_objective/kl"] == 0.0


def test_an_untrained_policy_neither_wins_nor_loses_against_itself_by_a_judge(tmp_path):
    made = trainer(
        tmp_path,
        reward_funcs=None,
        kwargs={"judge": lambda p, pairs, shuffle_order=True: [0] * len(p), "eval_dataset": dataset()},
    )
    metrics = made.evaluate()
    assert metrics["eval_win_rate"] == 1.0  # a judge that always says "first" is believed: position bias is its own
    assert metrics["eval_objective/kl"] == pytest.approx(0, abs=1e-5) and "eval_objective/scores" not in metrics


def test_compute_metrics_receives_scores_and_best_model_is_found(tmp_path):
    seen = []

    def best_share(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"best_share": float((prediction.predictions.max(1) > prediction.label_ids).mean())}

    made = trainer(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="best_share",
        greater_is_better=True,
        kwargs={"eval_dataset": dataset(), "compute_metrics": best_share},
    )
    made.train()
    assert seen[0] == ((12, 2), (12,)) and made.state.best_metric is not None
    assert made.predict(dataset(lengths=(4, 5))).predictions.shape == (2, 2)


# data ---------------------------------------------------------------------------------------------------------------


def test_streaming_equals_map_style(tmp_path):
    data = dataset()
    stream = IterableDataset.from_generator(lambda: iter(data.to_list()))
    calls = {"map": [], "stream": []}

    def keep(name):
        return lambda completions, **_: calls[name].append(completions) or word_reward(completions)

    for name, source in (("map", data), ("stream", stream)):
        trainer(
            tmp_path, train_dataset=source, reward_funcs=keep(name), max_steps=3, train_sampling_strategy="sequential"
        ).train()
    assert calls["map"] == calls["stream"] and len(calls["map"]) == 3


def test_invalid_rows_of_a_stream_are_counted(tmp_path):
    rows = [{"prompt": "w1 w2"}, {"prompt": "  "}, {"prompt": "w3"}, {"prompt": ""}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    made = trainer(tmp_path, train_dataset=stream, invalid_prompts="filter")
    made.train()
    [log] = train_logs(made)
    assert log["prompts"] == 4 and log["dropped/invalid_prompt"] == 2
    assert log["pairs/count"] + log.get("dropped/tie", 0) == 2
    with pytest.raises(InvalidPromptError, match="Row 1"):
        trainer(tmp_path, train_dataset=stream).train()


def test_a_stream_shorter_than_a_batch_is_read_again(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "w1"}]))
    made = trainer(tmp_path, train_dataset=stream, max_steps=3)
    made.train()
    assert [log["prompts"] for log in made.state.log_history if "prompts" in log] == [4, 4, 4]


def test_a_resumed_stream_goes_on_where_it_was_in_a_later_pass(tmp_path):
    """Six rows, four a step in two micro-batches: steps begin and end inside passes."""
    rows = dataset(lengths=(5, 9, 3, 7, 12, 4)).to_list()
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6)
    seen = {}

    def run(name, resume=None):
        calls = seen.setdefault(name, [])

        def reward(completions, name, **_):
            calls.append(list(dict.fromkeys(name)))
            return word_reward(completions)

        stream = IterableDataset.from_generator(lambda: iter(rows))
        made = trainer(
            tmp_path, train_dataset=stream, reward_funcs=reward, save_strategy="steps", save_steps=1, **options
        )
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "checkpoint-4"))
    assert [int(n.split()[1]) for call in seen["whole"] for n in call] == [*range(6)] * 4
    assert seen["resumed"] == seen["whole"][4:]
    assert all(torch.equal(p, resumed.model.get_parameter(n)) for n, p in whole.model.named_parameters())


def test_a_stream_without_max_steps_or_with_a_beta_for_each_epoch_is_refused(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(dataset().to_list()))
    with pytest.raises(ValueError, match="needs `max_steps`"):
        trainer(tmp_path, train_dataset=stream, max_steps=-1)
    with pytest.raises(ValueError, match="give one number"):
        trainer(tmp_path, train_dataset=stream, beta=[0.1, 0.2])


def test_an_own_collator_may_reorder_but_not_lose_columns(tmp_path):
    from online_dpo.data.collate import collate_prompts

    made = trainer(tmp_path, kwargs={"data_collator": lambda rows: collate_prompts(rows[::-1])})
    made.train()
    broken = trainer(tmp_path, kwargs={"data_collator": lambda rows: {"prompt": [r["prompt"] for r in rows]}})
    with pytest.raises(ValueError, match="prompt_ids"):
        broken.train()


# validation ---------------------------------------------------------------------------------------------------------


def arguments(tmp_path, **changes):
    model = tiny.causal_lm()
    base = dict(
        model=model,
        reward_funcs=word_reward,
        args=config(tmp_path),
        train_dataset=dataset(),
        processing_class=tiny.tokenizer(),
    )
    return base | {k: (model if v == "the policy" else v) for k, v in changes.items()}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(args=None), ValueError, "`args` must be given"),
        (dict(train_dataset=None), ValueError, "`train_dataset` must be given"),
        (dict(processing_class=None), ValueError, "`processing_class` must be given"),
        (dict(model=None), ValueError, "`model` must be given"),
        (dict(ref_model="the policy"), ValueError, "same object"),
        (dict(reward_funcs=None), ValueError, "Nothing scores the completions"),
        (dict(reward_model=word_reward), ValueError, "not both"),
        (dict(reward_funcs=None, judge=3), TypeError, "method `judge"),
        (dict(preprocess_logits_for_metrics=max), ValueError, "nothing to work on"),
        (dict(model="./no/such/folder"), ValueError, "no folder './no/such/folder'"),
        (dict(model="the policy", processing_class="gpt2"), TypeError, "must be a tokenizer"),
        (dict(train_dataset=Dataset.from_list([{"text": "x"}])), ValueError, "prompt_column"),
        (dict(train_dataset=Dataset.from_list([{"prompt": "w1", "prompt_ids": 1}])), ValueError, "Rename them"),
        (dict(train_dataset=Dataset.from_list([{"prompt": "w1"}, {"prompt": ""}])), InvalidPromptError, "Row 1"),
    ],
)
def test_wrong_arguments_say_what_to_do(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        OnlineDPOTrainer(**arguments(tmp_path, **changes))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(num_completions=1), "at least 2"),
        (dict(temperature=0.0), "above 0"),
        (dict(top_p=1.5), r"in \(0, 1\]"),
        (dict(beta=[0.1, -1.0]), "`beta`"),
        (dict(loss_type="dpo"), "one of sigmoid, ipo"),
        (dict(loss_type=["sigmoid", "dpo"]), "it is 'dpo'"),
        (dict(loss_type=[]), "at least one loss"),
        (dict(loss_type=["ipo", "ipo"]), "each once"),
        (dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0]), "names 2 losses"),
        (dict(loss_weights=[0.0]), "`loss_weights` must be finite numbers above 0"),
        (dict(label_smoothing=0.5), r"`label_smoothing` must be in \[0, 0.5\)"),
        (dict(label_smoothing_factor=0.1), "smoothed by `label_smoothing`"),
        (dict(loss_type="exo_pair"), "set `label_smoothing`, for example to 1e-3"),
        (dict(loss_type="sft", label_smoothing=0.1), "reads no labels"),
        (dict(simpo_gamma=-1.0), "`simpo_gamma` must be 0 or more"),
        (dict(dpop_lambda=float("inf")), "`dpop_lambda` must be 0 or more"),
        (dict(pair_selection="worst"), "best_worst, best_random"),
        (dict(min_margin=0.0), "`min_margin` must be above 0"),
        (dict(min_margin=2.0, max_margin=1.0), "no pair would be left"),
        (dict(max_length_ratio=0.5), "`max_length_ratio` must be 1 or more"),
        (dict(label_temperature=0.0), "`label_temperature` must be above 0"),
        (dict(tie_policy="first", margin_weighting=True), "without a margin, which `margin_weighting` needs"),
        (dict(tie_policy="random"), "skip, first"),
        (dict(sync_ref_model=True, ref_model_mixup_alpha=0.0), r"`ref_model_mixup_alpha` must be in \(0, 1\]"),
        (dict(sync_ref_model=True, ref_model_sync_steps=0), "`ref_model_sync_steps` must be at least 1"),
        (dict(max_length=64, max_new_tokens=64), "leaves no room for a prompt"),
        (dict(use_vllm=True, vllm_mode="serve"), "colocate, server"),
        (dict(use_vllm=True, vllm_structured_outputs_regex="a+"), "not in this version"),
        (dict(use_vllm=True, vllm_mode="server", vllm_server_timeout=0), "above 0"),
        (dict(use_vllm=True, vllm_mode="server", vllm_server_port=65536), "a port"),
        (dict(use_vllm=True, vllm_mode="server", vllm_server_base_url=" , "), "an address"),
        (dict(use_vllm=True, vllm_mode="server", vllm_weight_transfer="nccl"), "one of auto, broadcast, file, http"),
        (dict(use_vllm=True, vllm_mode="server", vllm_group_port=-1), "a port"),
        (dict(use_vllm=True, vllm_tensor_parallel_size=0), "at least 1"),
        (dict(use_vllm=True, vllm_gpu_memory_utilization=1.5), "at most 1"),
        (dict(max_staleness=-1), "`max_staleness` must be 0 or more"),
        (dict(sync_check_steps=-1), "`sync_check_steps` must be 0 or more"),
        (dict(remove_unused_columns=True), "remove_unused_columns"),
        (dict(generation_kwargs={"num_beams": 4}), "beam search"),
        (dict(missing_eos_penalty=-1.0), "missing_eos_penalty"),
        (dict(generation_kwargs={"temperature": 0.0}), "`temperature` must be above 0"),
        (dict(generation_kwargs={"no_repeat_ngram": 2}), "Did you mean `no_repeat_ngram_size`"),
        (dict(generation_kwargs={"typical_p": 0.5}), "typical_p"),
        (dict(auto_find_batch_size=True), "auto_find_batch_size"),
    ],
)
def test_wrong_configurations_say_what_to_do(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (dict(use_vllm=True), ValueError, "`use_vllm` needs vllm, not installed here"),
        (
            dict(use_vllm=True, generation_kwargs={"no_repeat_ngram_size": 2}),
            ValueError,
            "no counterpart of `no_repeat",
        ),
        (dict(use_vllm=True, temperature=1e-3), ValueError, "at least 0.01"),
        (
            dict(use_vllm=True, vllm_mode="server", vllm_server_port=9, vllm_server_timeout=0.5),
            RolloutServerError,
            "http://localhost:9/health has failed",
        ),
        (
            dict(use_vllm=True, vllm_mode="server", vllm_server_base_url="localhost:8000"),
            ValueError,
            "begins with http://",
        ),
    ],
)
def test_vllm_that_cannot_be_used_is_found_before_a_model_is_loaded(tmp_path, fields, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, model="a/model-that-does-not-exist", **fields)


def test_fields_of_vllm_that_are_not_read_give_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="Ignored without `use_vllm`: vllm_server_port"):
        config(tmp_path, vllm_server_port=80)
    with pytest.warns(UserWarning, match="Ignored with `vllm_mode='colocate'`: vllm_server_port"):
        config(tmp_path, use_vllm=True, vllm_server_port=80)
    several = config(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url="http://a:1/, http://b:2")
    assert several.vllm_server_urls == ["http://a:1", "http://b:2"]
    assert config(tmp_path, vllm_mode="server").vllm_server_urls == ["http://localhost:8000"]


def test_a_context_that_is_too_short_is_found_before_training(tmp_path):
    with pytest.raises(ValueError, match="room for 128 tokens"):
        trainer(tmp_path, max_length=512)


def test_a_reward_function_that_misbehaves_is_named(tmp_path):
    def half_asleep(completions, **_):
        return [1.0]

    with pytest.raises(ScoringError, match="half_asleep"):
        trainer(tmp_path, reward_funcs=half_asleep).train()


# files and reports --------------------------------------------------------------------------------------------------


def test_saved_model_loads_and_card_holds_the_runs_facts(tmp_path):
    made = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    made.train()
    made.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, made.model.get_parameter(n)) for n, p in loaded.named_parameters())
    made.create_model_card(model_name="my-model")
    card = (tmp_path / "README.md").read_text()
    assert (
        card.startswith("---\n")
        and "# my-model" in card
        and "| optimizer steps | 2 |" in card
        and "word_reward" in card
    )
    score = train_logs(made)[-1]["objective/scores"]
    assert f"| `objective/scores` | {score:.4g} | 2 |" in card
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and str(tmp_path) not in card


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


def test_loss_is_a_mean_over_pairs_and_the_last_steps_are_logged(tmp_path):
    """Steps 1 and 3 have no pairs: they count nowhere, neither as zero nor as lost."""
    calls = []

    def every_second(completions, **_):
        calls.append(1)
        return [float(i % 2) if len(calls) % 2 == 0 else 1.0 for i in range(len(completions))]

    made = trainer(tmp_path, reward_funcs=every_second, max_steps=3, logging_steps=2)
    made.train()
    logs = [log for log in made.state.log_history if "prompts" in log]
    assert [log["prompts"] for log in logs] == [8, 4]
    assert logs[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and "loss" not in logs[1]


def test_reward_model_path_beside_a_judge_is_the_reward_that_wins(tmp_path):
    with pytest.warns(UserWarning, match="the reward is used"), pytest.raises(ValueError, match="no/reward"):
        trainer(tmp_path, reward_funcs=None, reward_model_path="./no/reward", kwargs={"judge": LongerIsBetter()})


def test_missing_eos_penalty_lowers_unfinished_completions(tmp_path):
    made = trainer(tmp_path, reward_funcs=lambda completions, **_: [0.0] * len(completions), missing_eos_penalty=2.5)
    made.train()
    [log] = train_logs(made)
    assert log["objective/scores"] == pytest.approx(-2.5 * log["completions/clipped_ratio"])
    assert OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True).missing_eos_penalty is None


def test_resuming_a_run_that_was_over_trains_nothing_more(tmp_path):
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    made = trainer(tmp_path, max_steps=2)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert made.state.global_step == 2
    assert all(torch.equal(made.model.get_parameter(name), weight) for name, weight in saved.items())


def test_steps_without_any_pair_are_warned_of_once_until_there_are_some(tmp_path, caplog):
    steps = iter([True, True, False, True])

    def reward(completions):
        missing = next(steps)
        return [None if missing else float(number) for number, _ in enumerate(completions)]

    trainer(tmp_path, reward_funcs=reward, max_steps=4).train()
    said = [record.getMessage() for record in caplog.records if "Nothing was trained" in record.getMessage()]
    assert said == [
        f"Nothing was trained since the last log, at step {step}: none of 4 prompts gave a pair (missing_score 4)."
        for step in (1, 4)
    ]


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_column_that_a_reward_needs_is_missed_before_anything_is_loaded(tmp_path, name):
    def reward(completions, solution):
        return [0.0] * len(completions)

    with_column = dataset(solution=["a"] * len(LENGTHS))
    datasets = {"train_dataset": with_column, "eval_dataset": with_column, name: dataset()}
    with pytest.raises(ScoringError, match=f"`reward` needs the argument `solution`, but `{name}` has no such column"):
        trainer(
            tmp_path,
            model="org/that-is-nowhere",
            reward_funcs=reward,
            train_dataset=datasets["train_dataset"],
            kwargs={"eval_dataset": datasets["eval_dataset"]},
            eval_strategy="steps",
            eval_steps=1,
        )
