"""Invariant 14: what is borrowed comes back as it was, on errors too. Every public call leaves
the policy, the user's other models and the process as they were, but for what it is there to change.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from online_dpo.cli.main import main
from online_dpo.errors import ModelFolderError, ScoringError
from support import snapshots, tiny
from support.run_files import fill_folder, write_run_file
from support.training import dataset, trainer, weights, word_reward

PROMPTS = dataset((4, 6, 3))


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **options)


def trained_a_little(model, name):
    """LoRA starts with B = 0, where nothing is lost by mistake."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key:
                parameter.add_(0.05)
    return model


def lora_with_frozen_a(folder):
    model = get_peft_model(tiny.causal_lm(sharpness=1.0), lora())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


def frozen_adapter_beside_a_new_one(folder):
    model = trained_a_little(get_peft_model(tiny.causal_lm(sharpness=1.0), lora(), "sft"), "sft")
    model.add_adapter("new", lora())
    model.base_model.set_adapter(["new", "sft"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".new." in name)
    return model


def adapter_loaded_for_inference_beside_a_new_one(folder):
    trained_a_little(get_peft_model(tiny.causal_lm(sharpness=1.0), lora()), "default").save_pretrained(folder)
    model = get_peft_model(tiny.causal_lm(sharpness=1.0), lora(), "new")
    model.load_adapter(folder, "sft", is_trainable=False)
    model.base_model.set_adapter(["sft", "new"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".new." in name)
    return model


def adapter_with_a_saved_head(folder):
    return get_peft_model(tiny.causal_lm(sharpness=1.0, tie_word_embeddings=False), lora(modules_to_save=["lm_head"]))


def partly_frozen(folder):
    model = tiny.causal_lm(sharpness=1.0)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    return model


def modules_in_either_mode(folder):
    model = tiny.causal_lm("gpt2", sharpness=1.0, resid_pdrop=0.1).train()
    model.transformer.h[0].eval()
    model.transformer.h[1].mlp.dropout.eval()
    return model


POLICIES = [
    lora_with_frozen_a,
    frozen_adapter_beside_a_new_one,
    adapter_loaded_for_inference_beside_a_new_one,
    adapter_with_a_saved_head,
    partly_frozen,
    modules_in_either_mode,
]


def drawing_reward(completions, **_):
    """Draws from all generators, as rewards may."""
    noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
    return [score + 1e-3 * noise for score in word_reward(completions)]


@pytest.mark.parametrize("make", POLICIES, ids=lambda make: make.__name__)
def test_every_call_but_training_leaves_the_policy_and_the_process_as_they_were(tmp_path, make):
    model = make(tmp_path / "adapter")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    made = trainer(tmp_path, model, drawing_reward, num_completions=2, kwargs={"eval_dataset": PROMPTS})
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    made.save_model()  # transformers notes the class and the dtype in the config
    calls = {
        "evaluate": made.evaluate,
        "predict": lambda: made.predict(PROMPTS),
        "save_model": made.save_model,
        "create_model_card": made.create_model_card,
    }
    for name, call in calls.items():
        before, process = snapshots.of_model(model), snapshots.of_process()
        call()
        assert snapshots.changed(before, snapshots.of_model(model)) == set(), name
        assert snapshots.changed(process, snapshots.of_process()) == set(), name


@pytest.mark.parametrize("make", POLICIES, ids=lambda make: make.__name__)
def test_training_changes_what_is_trainable_and_nothing_else(tmp_path, make):
    model = make(tmp_path / "adapter")
    made = trainer(tmp_path, model, max_steps=2, eval_strategy="steps", eval_steps=1, kwargs={"eval_dataset": PROMPTS})
    before = snapshots.of_model(model)
    made.train()
    after = snapshots.of_model(model)
    kinds = {name.rpartition(": ")[2] for name in snapshots.changed(before, after)}
    assert kinds <= {"weight", "training", "_is_accelerate_prepared"}
    for name in before:
        if name.endswith(": weight"):
            kept = torch.equal(before[name], after[name])
            assert kept is not before[name.replace(": weight", ": requires_grad")], name


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_calls_that_fail_leave_the_policy_and_the_process_as_they_were(tmp_path, error):
    """In the middle of an evaluation, and in the passes of policy and reference."""
    model = frozen_adapter_beside_a_new_one(tmp_path)
    made = trainer(tmp_path, model, kwargs={"eval_dataset": PROMPTS})
    layer = model.get_base_model().model.layers[1]

    def count_down(*_):
        left[0] -= 1
        if left[0] == 0:
            torch.rand(())
            raise error("unplugged")

    made.evaluate()  # what is found out once is found out here
    handle, left = layer.register_forward_pre_hook(count_down), [0]
    made.evaluate()
    handle.remove()
    for when in range(1, 1 - left[0], 3):
        before, process = snapshots.of_model(model), snapshots.of_process()
        handle = layer.register_forward_pre_hook(count_down)
        left = [when]
        with pytest.raises(error, match="unplugged"):
            made.evaluate()
        handle.remove()
        assert snapshots.changed(before, snapshots.of_model(model)) == set(), when
        assert snapshots.changed(process, snapshots.of_process()) == set(), when


def test_a_run_with_evaluations_is_the_run_without(tmp_path):
    """Also where rewards draw random numbers."""
    runs = {}
    for strategy in ("no", "steps"):
        model = modules_in_either_mode(None)
        options = dict(max_steps=3, eval_strategy=strategy, eval_steps=1, disable_dropout=False, max_new_tokens=4)
        made = trainer(tmp_path, model, drawing_reward, **options, kwargs={"eval_dataset": PROMPTS})
        made.train()
        runs[strategy] = weights(model)
    for name, weight in runs["no"].items():
        assert torch.equal(weight, runs["steps"][name]), name


@pytest.mark.parametrize("make", POLICIES[:2], ids=lambda make: make.__name__)
def test_what_is_frozen_stays_frozen_when_weights_are_loaded(tmp_path, make):
    """Of a checkpoint to resume from, and of the best one at the end."""
    options = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, logging_steps=1)
    options |= dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, max_steps=2)
    model = make(tmp_path / "adapter")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    active = list(model.base_model.active_adapters)
    made = trainer(tmp_path, model, **options, kwargs={"eval_dataset": PROMPTS})
    made.train()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    again = make(tmp_path / "adapter")
    made = trainer(tmp_path, again, **{**options, "max_steps": 3}, kwargs={"eval_dataset": PROMPTS})
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {name: p.requires_grad for name, p in again.named_parameters()} == flags
    assert list(again.base_model.active_adapters) == active


def reward_model():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny.config("llama", num_labels=1, attention_dropout=0.1)).train()


PATCHES = {"forward", "forward_of_logits", "takes_read_X", "forward_everywhere", "token_wise"}
"""What is put on the user's other models: see "Your models" in the guide."""


@pytest.mark.parametrize("method", ["online_dpo", "xpo", "nash_md"])
def test_the_users_other_models_are_left_as_they_were(tmp_path, method):
    reference = tiny.causal_lm(sharpness=1.0, seed=5, attention_dropout=0.1).train()
    reference.model.layers[0].eval()
    reward = reward_model()
    before = [snapshots.of_model(model) for model in (reference, reward)]
    made = trainer(
        tmp_path,
        reward_funcs=reward,
        method=method,
        eval_strategy="steps",
        eval_steps=1,
        kwargs={"ref_model": reference, "eval_dataset": PROMPTS, "reward_processing_classes": tiny.tokenizer()},
    )
    made.train()
    for model, state in zip((reference, reward), before, strict=True):
        after = snapshots.of_model(model)
        found = {name.rpartition(": ")[2] for name in snapshots.changed(state, after)}
        assert found <= PATCHES | {"config"}
        assert {key for key in after["config"] if after["config"][key] != state["config"].get(key)} <= {
            "_attn_implementation_internal"
        }


def test_where_a_trainer_cannot_be_made_the_users_models_are_as_they_were(tmp_path):
    """The last thing a constructor does may fail: here, to load the gold reward, which lacks a weight."""
    reward_model().save_pretrained(tmp_path / "gold")
    file = tmp_path / "gold" / "model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if n != "score.weight"}, file, metadata={"format": "pt"})
    policy = tiny.causal_lm(sharpness=1.0, attention_dropout=0.1).train()
    reference, reward, settings = tiny.causal_lm(seed=5), reward_model(), lora()
    policy.config.use_cache = True
    before = [snapshots.of_model(model) for model in (policy, reference, reward)]
    chosen = repr(settings)
    arguments = dict(
        ref_model=reference,
        peft_config=settings,
        eval_reward_funcs=str(tmp_path / "gold"),
        reward_processing_classes=tiny.tokenizer(),
    )
    with pytest.raises(ModelFolderError, match="score.weight"):
        trainer(tmp_path, policy, reward, kwargs=arguments)
    for model, state in zip((policy, reference, reward), before, strict=True):
        assert snapshots.changed(state, snapshots.of_model(model)) == set()
    assert repr(settings) == chosen


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_flags_configs_and_process_as_they_were(tmp_path, error):
    model = lora_with_frozen_a(None)

    def reward(completions, **_):
        calls.append(None)
        if len(calls) == 3:
            raise error("unplugged")
        return word_reward(completions)

    calls = []
    made = trainer(tmp_path, model, reward, max_steps=5)
    before, process = snapshots.of_model(model), snapshots.of_process()
    with pytest.raises((ScoringError, KeyboardInterrupt)):
        made.train()
    kinds = {name.rpartition(": ")[2] for name in snapshots.changed(before, snapshots.of_model(model))}
    assert kinds <= {"weight", "training", "_is_accelerate_prepared"}
    assert snapshots.changed(process, snapshots.of_process()) <= {"torch", "numpy", "python"}


def test_the_reference_of_an_adapter_with_biases_does_not_move(tmp_path, caplog):
    model = get_peft_model(tiny.causal_lm("qwen2", sharpness=1.0, tie_word_embeddings=False), lora(bias="all"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), model.disable_adapter():
        start = model(ids).logits.clone()
    made = trainer(tmp_path, model, max_steps=3, learning_rate=1e-2)
    assert "Weights outside the adapter" in caplog.text
    made.train()
    with torch.no_grad(), made.reference.active() as reference:
        assert torch.equal(reference(ids).logits, start)


def test_a_merged_adapter_is_refused(tmp_path):
    model = get_peft_model(tiny.causal_lm(sharpness=1.0), lora())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        trainer(tmp_path, model)


def test_commands_leave_the_process_as_it_was(tmp_path, monkeypatch, capsys):
    reward = "def reward(completions, **_):\n    return [float(len(text)) for text in completions]\n"
    monkeypatch.chdir(fill_folder(tmp_path, reward))
    run = write_run_file(tmp_path, reward_funcs="./feedback.py:reward", max_new_tokens=2)
    commands = [
        ["train", str(run)],
        ["eval", "./policy", "--against", "./policy", "--prompts", "data.jsonl", "--reward", "./feedback.py:reward"],
        ["eval", "./policy", "--against", "./nowhere", "--prompts", "data.jsonl", "--reward", "./feedback.py:reward"],
    ]
    main(commands[0])  # some libraries set variables when they are first imported
    for words in commands:
        before = snapshots.of_process()
        main(words)
        changed = snapshots.changed(before, snapshots.of_process()) - {"torch", "numpy", "python"}
        assert changed == set(), (words, capsys.readouterr())
