"""What a run saves, and how it goes on from that: invariants 5 and 9 of docs/project/architecture."""

import json
from functools import wraps

import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from online_dpo.errors import (
    ScoringError,
)
from support import tiny
from support.training import dataset, step_logs, train_logs, trainer, weights, word_reward

# invariant 5 ----------------------------------------------------------------------------------------------------------


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

    @wraps(word_reward)
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
    steps = [step_logs(made) for made in (whole, resumed)]
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


# invariant 9 ----------------------------------------------------------------------------------------------------------


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


def test_resuming_a_run_that_was_over_trains_nothing_more(tmp_path):
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    made = trainer(tmp_path, max_steps=2)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert made.state.global_step == 2
    assert all(torch.equal(made.model.get_parameter(name), weight) for name, weight in saved.items())
