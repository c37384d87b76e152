"""What scripts do to a trainer as an object: look at it, inherit from it, change its configuration while it runs."""

import inspect

import pytest
from transformers import TrainerCallback

from online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from support.training import config, dataset, train_logs, trainer


class ChangeAfterTheFirstStep(TrainerCallback):
    def __init__(self, **fields):
        self.fields = fields

    def on_step_end(self, args, state, control, **kwargs):
        for name, value in self.fields.items():
            setattr(args, name, value)


def test_a_callback_may_change_how_completions_are_scored(tmp_path):
    callback = ChangeAfterTheFirstStep(length_penalty=1000.0, reward_weights=[2.0])
    made = trainer(tmp_path, max_steps=2, kwargs={"callbacks": [callback]})
    made.train()
    first, second = train_logs(made)
    assert first["objective/scores"] >= 0 and second["objective/scores"] < -1000
    assert float(made.reward_weights[0]) == 2.0


def test_the_constructor_shows_its_arguments():
    names = list(inspect.signature(OnlineDPOTrainer).parameters)
    assert names[:4] == ["model", "ref_model", "reward_funcs", "judge"] and "args" not in names[:2]
    assert "model" in inspect.signature(type("Sub", (OnlineDPOTrainer,), {})).parameters


def test_a_subclass_may_set_what_trl_reads_and_override_what_it_is_made_of(tmp_path):
    class Born:
        def __new__(cls, *args, **kwargs):
            made = super().__new__(cls)
            made.born = True
            return made

    class Own(OnlineDPOTrainer, Born):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.temperature = 0.5
            self.last_feedback = self.dropped_rows = None

        @property
        def generation_kwargs(self):
            return {"max_new_tokens": 3}

    plain = trainer(tmp_path)
    made = Own(
        model=plain.model,
        reward_funcs=plain.reward_funcs[0],
        args=config(tmp_path),
        train_dataset=dataset(),
        processing_class=plain.tokenizer,
    )
    assert (made.born, made.temperature, plain.temperature) == (True, 0.5, 0.9)
    assert made.generation_config.max_new_tokens == 3 and made.last_feedback is None
    assert OnlineDPOTrainer.last_feedback is None
    with pytest.raises(TypeError, match="`Own` has no argument|unexpected keyword"):
        Own(modle=1)


@pytest.mark.parametrize("value", [None, "one", True, [1.0]])
def test_numbers_of_transformers_must_be_numbers(tmp_path, value):
    with pytest.raises((ValueError, TypeError), match="max_grad_norm"):
        config(tmp_path, max_grad_norm=value)


def test_fields_of_vllm_without_vllm_are_ignored_whatever_they_hold(tmp_path):
    with pytest.warns(UserWarning, match="Ignored without `use_vllm`: vllm_mode"):
        assert config(tmp_path, vllm_mode=None).vllm_mode is None
    with pytest.raises(ValueError, match="`vllm_mode` must be one of colocate, server"):
        config(tmp_path, use_vllm=True, vllm_mode="zzz")
    assert OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, dataset_num_proc=0).dataset_num_proc == 0
