"""A run that can train nothing is refused at its start; one that has trained nothing does not end as if it had."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from online_dpo.cli.runfile.run_file import plan_run
from online_dpo.cli.train import train
from online_dpo.errors import NothingTrainedError
from support import run_files, tiny
from support.training import config, dataset, trainer, weights

LORA = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
NOWHERE = "org/that-is-nowhere"


def model():
    return tiny.causal_lm(sharpness=1.0)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def constant(completions, **_):
    return [1.0] * len(completions)


def silent(completions, **_):
    return [None] * len(completions)


# before anything is sampled -----------------------------------------------------------------------------------------


def never(completions, **_):
    raise AssertionError("nothing may be sampled")


def refused(tmp_path, message, model, **options):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model, reward_funcs=never, **options).train()


def test_frozen_weights_are_refused_before_a_model_is_loaded(tmp_path):
    options = {"reward_funcs": NOWHERE}
    with pytest.raises(ValueError, match=r"Nothing to train: all 20 weights are frozen. Call `model.requires_grad_"):
        trainer(tmp_path, model=model().requires_grad_(False), **options)
    get_peft_model(model(), LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="are frozen. Load the adapter with `is_trainable=True`"):
        trainer(tmp_path, model=frozen, **options)


def test_weights_that_are_frozen_later_are_found_at_the_start_of_training(tmp_path):
    made = trainer(tmp_path, reward_funcs=never)
    made.model.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing to train: all 20 weights are frozen"):
        made.train()


def test_an_optimizer_of_other_tensors_is_refused(tmp_path):
    policy = model()
    before = sgd(policy)
    message = "the optimizer holds 20 tensors, and none of the 8 trainable weights"
    refused(tmp_path, message, policy, kwargs={"optimizers": (before, None), "peft_config": LoraConfig(**LORA)})
    message = "the optimizer holds 20 tensors, and none of the 20 trainable weights"
    refused(tmp_path, message, model(), kwargs={"optimizers": (sgd(model()), None)})
    made = trainer(tmp_path, reward_funcs=never)
    made.optimizer = sgd(model())
    with pytest.raises(ValueError, match="none of the 20 trainable weights"):
        made.train()


def test_an_optimizer_of_a_part_is_warned_of_with_the_numbers(tmp_path, caplog):
    policy = model()
    part = [*policy.model.layers[0].parameters()]
    share = 100 * sum(p.numel() for p in part) / sum(p.numel() for p in policy.parameters())
    sgd_of_part = torch.optim.SGD([*part, torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    trainer(tmp_path, model=policy, kwargs={"optimizers": (sgd_of_part, None)}).train()
    [said] = [r.getMessage() for r in caplog.records if "The optimizer holds" in r.getMessage()]
    assert f"holds {len(part)} of the 20 trainable weights ({share:.0f} % of the numbers" in said
    assert "not the model's: 1." in said
    caplog.clear()
    trainer(tmp_path, kwargs={"peft_config": LoraConfig(**LORA)}).train()
    assert "The optimizer holds" not in caplog.text


def test_a_rate_or_a_length_of_nothing_is_refused(tmp_path):
    policy = model()
    refused(tmp_path, "learning rate of the optimizer is 0", policy, kwargs={"optimizers": (sgd(policy, lr=0.0), None)})
    for fields, message in (
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be above 0"),
        ({"max_steps": 0}, "`max_steps` must be 1 or more, or -1"),
        ({"max_steps": -1, "num_train_epochs": 0}, "`num_train_epochs` must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **fields)


def test_too_few_rows_for_a_whole_batch_are_refused_before_a_model_is_loaded(tmp_path):
    fields = {"dataloader_drop_last": True, "per_device_train_batch_size": 13, "max_steps": -1}
    refused(tmp_path, "`train_dataset` has 12 rows, a batch needs 13", NOWHERE, **fields)
    rows = dataset([5] * 13)
    made = trainer(tmp_path, train_dataset=rows, **{**fields, "num_train_epochs": 1})
    made.train()
    assert made.state.global_step == 1
    unusable = [{"prompt": ""}] * 12
    refused(
        tmp_path,
        "No row of train_dataset is a usable prompt",
        NOWHERE,
        train_dataset=unusable,
        invalid_prompts="filter",
    )


# at the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_funcs": constant}, "Dropped of 12 prompts: tie 12. Of 3 steps: without a pair 3."),
        ({"reward_funcs": silent}, "Dropped of 12 prompts: missing_score 12. Of 3 steps: without a pair 3."),
        (
            {"warmup_steps": 3, "lr_scheduler_type": "constant_with_warmup", "max_steps": 1},
            "Of 1 steps: learning rate 0 1.",
        ),
    ],
)
def test_a_run_that_trained_nothing_ends_in_an_error_with_a_checkpoint(tmp_path, options, message):
    made = trainer(tmp_path, logging_steps=2, **{"max_steps": 3, **options})
    before = weights(made.model)
    steps = made.args.max_steps
    with pytest.raises(NothingTrainedError, match=message) as caught:
        made.train()
    assert f"{tmp_path}/checkpoint-{steps}" in str(caught.value)
    assert json.loads((tmp_path / f"checkpoint-{steps}" / "trainer_state.json").read_text())["global_step"] == steps
    assert all(torch.equal(before[name], p) for name, p in made.model.named_parameters())


def nan_loss(module, args, output):
    return (output[0] * float("nan"), output[1]) if module.training else None


def test_steps_that_are_not_finite_train_nothing(tmp_path):
    policy = model()
    policy.register_forward_hook(nan_loss)
    with pytest.raises(NothingTrainedError, match="Of 2 steps: not finite 2."):
        trainer(tmp_path, model=policy, max_steps=2).train()


def test_one_step_that_trains_is_enough(tmp_path):
    calls = iter([False, True, False])

    def once(completions, **_):
        works = next(calls)
        return [float(number % 2) if works else 1.0 for number, _ in enumerate(completions)]

    made = trainer(tmp_path, reward_funcs=once, max_steps=3)
    made.train()
    assert made.guard.trained_steps == 1 and dict(made.guard.untrained)["without a pair"] == 2
    assert not (tmp_path / "checkpoint-3").exists()


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False])
def test_what_was_trained_before_a_resumption_counts(tmp_path, trains):
    """Also where nothing was logged up to the checkpoint."""

    def before(completions, **_):
        return [float(number % 2) for number, _ in enumerate(completions)] if trains else constant(completions)

    saves = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    first = trainer(tmp_path, reward_funcs=before, max_steps=4, **saves)
    if trains:
        first.train()
    else:
        with pytest.raises(NothingTrainedError):
            first.train()
    for checkpoint in (2, 4):  # the last is that of a run that was over
        # another reward function: a run that trains nothing more
        resumed = trainer(tmp_path / "resumed", reward_funcs=constant, max_steps=4, resume_anyway=True)
        if trains:
            resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
            assert resumed.state.global_step == 4
        else:
            with pytest.raises(NothingTrainedError, match="trained nothing"):
                resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))


def test_the_command_ends_with_code_3_and_one_line(tmp_path, capsys):
    folder = run_files.fill_folder(tmp_path, "def same(completions):\n    return [1.0] * len(completions)\n")
    path = run_files.write_run_file(folder, reward_funcs=["feedback.py:same"], max_steps=2)
    assert train(plan_run(path, []), [str(path)], show_traceback=False) == 3
    output, errors = capsys.readouterr()
    [line] = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "Dropped of 16 prompts: tie 16. Of 2 steps: without a pair 2." in line
    assert "Model saved" not in output and not (folder / "out" / "model.safetensors").exists()
    assert (folder / "out" / "checkpoint-2" / "model.safetensors").is_file()


# weights that do not change -----------------------------------------------------------------------------------------


def ratios(made):
    return [log["train/updated_ratio"] for log in made.state.log_history if "train/updated_ratio" in log]


class Watch(TrainerCallback):
    """The share of all weights that changed in each step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.last, self.shares = weights(model), []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = weights(model)
        changed = sum(int((now[name] != self.last[name]).sum()) for name in now)
        self.shares.append(changed / sum(p.numel() for p in now.values()))
        self.last = now


def hardly(caplog):
    return [r.getMessage() for r in caplog.records if "hardly change" in r.getMessage()]


@pytest.mark.parametrize("half", [True, False])
def test_the_share_of_changed_weights_is_measured(tmp_path, caplog, half):
    watch = Watch()
    policy = model().bfloat16() if half else model()
    made = trainer(tmp_path, model=policy, learning_rate=5e-7, max_steps=4, kwargs={"callbacks": [watch]})
    made.train()
    assert ratios(made) == pytest.approx(watch.shares)
    assert all(share < 0.02 if half else share > 0.95 for share in watch.shares)
    assert len(hardly(caplog)) == half
    if half:
        assert "for 3 logs in a row" in hardly(caplog)[0] and "at step 3" in hardly(caplog)[0]


def test_a_sample_of_a_larger_model_tells_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("online_dpo.training.update_ratio.SAMPLE", 2000)
    watch = Watch()
    made = trainer(tmp_path, model=model().bfloat16(), learning_rate=1e-5, max_steps=2, kwargs={"callbacks": [watch]})
    made.train()
    assert 1000 < made.updates.drain_changed()[1] < 2500
    assert ratios(made) == pytest.approx(watch.shares, abs=0.03) and min(ratios(made)) > 0.05


@pytest.mark.slow
def test_a_rate_below_rounding_is_warned_of_once(tmp_path, caplog):
    trainer(tmp_path, learning_rate=1e-13, max_steps=8).train()
    assert len(hardly(caplog)) == 1


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler_type": "linear", "warmup_steps": 100_000},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 30.0, "lr_end": 0.0}},
    ],
    ids=["warm-up", "end"],
)
def test_schedules_that_begin_or_end_at_0_raise_no_alarm(tmp_path, caplog, schedule):
    fields = {"max_steps": 6, "learning_rate": 1e-6, **schedule}
    made = trainer(tmp_path, **fields)
    made.train()
    assert sum(ratio < 0.02 for ratio in ratios(made)) >= 3 and not hardly(caplog)


def test_steps_that_train_nothing_raise_no_alarm(tmp_path, caplog):
    calls = iter(range(100))

    def at_first(completions, **_):
        works = next(calls) == 0
        return [float(number % 2) if works else 1.0 for number, _ in enumerate(completions)]

    with caplog.at_level(logging.WARNING):
        made = trainer(tmp_path, reward_funcs=at_first, max_steps=6)
        made.train()
    assert ratios(made)[1:] == [0.0] * 5 and not hardly(caplog)
