"""Who computes inside of the trainer's mixed precision: models that are trained, and none of the code around them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from online_dpo.data.collate import collate_prompts
from online_dpo.modeling.precision import without_autocast
from online_dpo.objective.losses import loss
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.registry import engine
from online_dpo.rollout.weights.export import named_weights
from online_dpo.training.metric_registry import metric
from support import tiny
from support.plugins import names_restored
from support.training import LORA, dataset, trainer, word_reward


def autocast():
    return torch.is_autocast_enabled("cpu")


class Seen(dict):
    """Where autocast was on, by who asked; both if it was sometimes."""

    def by(self, who):
        self.setdefault(who, set()).add(autocast())


class Engine(TransformersEngine):
    """An engine that has weights of its own, or calls the policy."""

    def __init__(self, policy, tokenizer, seen, has_own_weights):
        super().__init__(tiny.causal_lm() if has_own_weights else policy, tokenizer)
        self.seen, self.has_own_weights, self.weights = seen, has_own_weights, {}
        self.own_dtype = torch.float32 if has_own_weights else None

    def sync(self, model, version):
        self.version = version
        self.seen.by("sync")
        if self.has_own_weights:
            self.weights = {name: weight.clone() for name, weight in named_weights(model)}
            self.model.load_state_dict(self.weights, strict=False)  # the head is tied

    def generate(self, *args):
        self.seen.by("generate")
        return super().generate(*args)


@pytest.fixture
def run(tmp_path):
    """A run of two steps with evaluations in bf16, with code of a user's wherever it may be; and what each saw."""

    def run(has_own_weights, model=None, **fields):
        seen = Seen()
        logits = []

        def reward(completions, **_):
            seen.by("reward")
            return word_reward(completions)

        def gold(completions, **_):
            seen.by("gold")
            return word_reward(completions)

        def collate(rows):
            seen.by("collator")
            return collate_prompts(rows)

        def compute_metrics(prediction):
            seen.by("compute_metrics")
            return {}

        class Callback(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                seen.by("callback")

        with names_restored():

            @engine("watching")
            def build(policy, tokenizer, args):
                return Engine(policy, tokenizer, seen, has_own_weights)

            @loss("watching")
            def watching(pairs, options):
                seen.by("loss")
                return -torch.nn.functional.logsigmoid(options.beta * (pairs.chosen_N - pairs.rejected_N))

            @metric("watching")
            def watching_metric(*_):
                seen.by("metric")
                return 0.0

            made = trainer(
                tmp_path,
                model,
                reward_funcs=reward,
                bf16=True,
                max_steps=2,
                engine="watching",
                loss_type="watching",
                eval_strategy="steps",
                eval_steps=1,
                kwargs=dict(
                    eval_dataset=dataset((3, 5)),
                    eval_reward_funcs=gold,
                    data_collator=collate,
                    compute_metrics=compute_metrics,
                    callbacks=[Callback()],
                ),
                **fields,
            )
            body = made.policy.get_submodule("model.layers.0.self_attn.q_proj") if model is None else None
            if body is not None:
                body.register_forward_hook(lambda module, args, output: logits.append((autocast(), output.dtype)))
            made.train()
        return made, seen, logits

    return run


AROUND = ("reward", "gold", "collator", "compute_metrics", "callback", "loss", "metric")


@pytest.mark.parametrize("has_own_weights", [False, True])
def test_code_of_others_runs_outside_of_mixed_precision_and_the_policy_inside(run, has_own_weights):
    made, seen, passes = run(has_own_weights)
    assert {who: seen[who] for who in AROUND} == {who: {False} for who in AROUND}
    assert seen["sync"] == {False}
    assert seen["generate"] == {not has_own_weights}
    if not has_own_weights:
        assert set(passes) == {(True, torch.bfloat16)}


def test_an_adapter_is_merged_for_an_engine_in_the_dtype_of_the_weights(run):
    """In mixed precision the product of its matrices would be rounded to bf16."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.causal_lm(sharpness=1.0), LoraConfig(init_lora_weights=False, **LORA))
    made, _, _ = run(True, model)  # the evaluation of the last step has sent what the model holds
    expected = dict(named_weights(model))
    weights = made.sampler.engine.weights
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_outside_of_autocast_nothing_is_changed_by_leaving_it():
    with without_autocast():
        assert not autocast()
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast():
            assert not autocast()
        assert autocast() and torch.get_autocast_dtype("cpu") == torch.bfloat16
