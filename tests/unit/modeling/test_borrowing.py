"""What is lent comes back as it was."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

from online_dpo.distributed.process_state import environment, kept_random_state
from online_dpo.modeling.borrowing import ModelState, adapter_off, eval_mode, kept_flags
from online_dpo.modeling.loading import disable_dropout
from online_dpo.modeling.logprobs import enable_logprobs
from online_dpo.modeling.reference import trains_base_weights
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.rollout.weights.adapter import write_adapter
from online_dpo.rollout.weights.export import write_weights
from online_dpo.scoring.rewards.model import RewardModelScorer
from support import snapshots, tiny

IDS = torch.tensor([[5, 6, 7, 8]])


def two_adapters():
    torch.manual_seed(0)
    settings = dict(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.causal_lm(), LoraConfig(**settings), "a")
    model.add_adapter("b", LoraConfig(**settings))
    return model


def in_mixed_modes(model):
    model.train()
    for module in list(model.modules())[::3]:
        module.training = False
    return model


def unchanged(model):
    """Asserts, when it ends, that the model is as it was when it began."""

    class Check:
        def __enter__(self):
            self.before = snapshots.of_model(model)

        def __exit__(self, *error):
            assert snapshots.changed(self.before, snapshots.of_model(model)) == set()

    return Check()


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"], ["b"]])
@pytest.mark.parametrize("frozen", ["lora_A", ".a.", "lora"])
def test_an_adapter_that_was_off_is_as_it_was(order, frozen):
    model = in_mixed_modes(two_adapters())
    model.base_model.set_adapter(order)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and frozen not in name)
    base = tiny.causal_lm()(IDS).logits
    with unchanged(model), torch.no_grad():
        with adapter_off(model):
            assert torch.equal(model(IDS).logits, base)
            assert not any(module.training for module in model.modules())
        with pytest.raises(KeyboardInterrupt), adapter_off(model):
            raise KeyboardInterrupt


def test_adapters_that_were_off_stay_off():
    model = two_adapters()
    model.base_model.model.model.layers[0].self_attn.q_proj.enable_adapters(False)  # in one layer
    with unchanged(model), adapter_off(model):
        pass
    model.base_model.disable_adapter_layers()
    with unchanged(model), adapter_off(model):
        pass


def test_each_module_comes_back_in_its_own_mode():
    model = in_mixed_modes(tiny.causal_lm())
    with unchanged(model), eval_mode(model) as lent:
        assert not any(module.training for module in lent.modules())


def test_modules_that_do_more_than_note_their_mode_are_told_of_it():
    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2)).train()
    with eval_mode(model):
        assert model[0].merged
    assert not model[0].merged


def test_flags_that_a_library_changes_come_back():
    model = two_adapters()
    with unchanged(model), kept_flags(model):
        model.set_adapter("b")
        model.requires_grad_(True)


def test_a_whole_model_comes_back():
    model = tiny.causal_lm("gpt2", resid_pdrop=0.1).train()
    before = snapshots.of_model(model)
    handle = model.register_forward_hook(lambda *_: None)
    state = ModelState(model)
    with_hook = snapshots.of_model(model)
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"]))
    enable_logprobs(policy)
    disable_dropout(policy)
    policy.to(torch.bfloat16).eval()
    model.config.eos_token_id, model.generation_config.eos_token_id, model.config.new = 7, 7, 7
    model.register_forward_pre_hook(lambda *_: None)
    del model.config.pad_token_id
    state.restore()
    assert snapshots.changed(with_hook, snapshots.of_model(model)) == set()
    handle.remove()
    assert snapshots.changed(before, snapshots.of_model(model)) == set()


def test_random_states_and_environment_come_back(monkeypatch):
    monkeypatch.setenv("SET_BEFORE", "1")
    monkeypatch.delenv("SET_NOT", raising=False)
    before = snapshots.of_process()
    with pytest.raises(KeyboardInterrupt), kept_random_state(), environment(SET_BEFORE="2", SET_NOT="3"):
        assert (os.environ["SET_BEFORE"], os.environ["SET_NOT"]) == ("2", "3")
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        del os.environ["SET_NOT"]
        raise KeyboardInterrupt
    assert snapshots.changed(before, snapshots.of_process()) == set()


@pytest.mark.parametrize("extra", [{}, {"cache_implementation": "static"}])
def test_sampling_leaves_the_model_as_it_was(extra):
    model = in_mixed_modes(two_adapters())
    engine = TransformersEngine(model, tiny.tokenizer())
    params = SamplingParams(max_new_tokens=4, end_token_ids=(tiny.EOS,), extra=extra)
    with unchanged(model):
        engine.generate(tiny.prompts([3, 5]), 2, params, RolloutKey(0, 0, 0))

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(fail)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        engine.generate(tiny.prompts([3, 5]), 2, params, RolloutKey(0, 0, 0))
    handle.remove()


def test_handing_weights_on_leaves_the_policy_as_it_was(tmp_path):
    """Adapters are merged into copies."""
    model = in_mixed_modes(two_adapters())
    with unchanged(model):
        write_weights(model, tmp_path)
        write_adapter(model, tmp_path / "adapter")


def test_scoring_leaves_a_reward_model_as_it_was():
    torch.manual_seed(0)
    model = in_mixed_modes(LlamaForSequenceClassification(tiny.config("llama", num_labels=1)))
    scorer = RewardModelScorer(model, tiny.tokenizer())
    with unchanged(model):
        scorer.score([tiny.group(prompt, [[7, 8], [9, 10, 11]]) for prompt in tiny.prompts([12, 20])])


def test_weights_beside_the_adapter_that_are_trained_are_seen():
    def trains(model):
        return trains_base_weights(model)

    settings = dict(task_type="CAUSAL_LM", target_modules=["q_proj"])
    assert not trains(two_adapters())
    plain = tiny.causal_lm("qwen2", tie_word_embeddings=False)
    assert trains(get_peft_model(plain, LoraConfig(bias="all", **settings)))
    plain = tiny.causal_lm(tie_word_embeddings=False)
    with_head = get_peft_model(plain, LoraConfig(modules_to_save=["lm_head"], **settings))
    assert not trains(with_head)
    with_head.base_model.model.model.norm.weight.requires_grad_(True)
    assert trains(with_head)
