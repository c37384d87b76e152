"""The `optim` choices of transformers: those that need no package train and are guarded, others are refused."""

import math

import pytest
import torch
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from online_dpo.config import requirements
from support import tiny
from support.training import train_logs, trainer, weights

WORKING = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
REFUSED = {
    "adamw_torch_8bit": "torchao",
    "adamw_bnb_8bit": "bitsandbytes",
    "paged_lion_8bit": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "galore_adamw": "galore_torch",
    "adalomo": "updates weights during the backward pass",
    "grokadamw": "grokadamw",
    "schedule_free_adamw": "schedulefree",
    "apollo_adamw": "apollo_torch",
    "stable_adamw": "torch-optimi",
    "adamw_anyprecision": "torchdistx",
}


def snapshot(made):
    """Weights, and all that the optimizer remembers."""
    state = made.optimizer.state_dict()["state"]
    remembered = {(i, k): torch.as_tensor(v).clone() for i, s in state.items() for k, v in s.items() if v is not None}
    return weights(made.model), remembered


def poison_second(module, args, output):
    """Makes the log-probabilities of the second training forward NaN."""
    if not module.training:
        return None
    module.forwards = getattr(module, "forwards", 0) + 1
    return (output[0] * float("nan"), output[1]) if module.forwards == 2 else None


class Snapshots(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(snapshot(self.made))


def test_the_names_are_those_of_transformers():
    assert {*WORKING, *REFUSED} <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize("optim", WORKING)
def test_optimizer_trains(tmp_path, optim):
    made = trainer(tmp_path, optim=optim, max_steps=3, max_grad_norm=1.0)
    before = weights(made.model)
    made.train()
    assert made.state.global_step == 3
    for name, parameter in made.model.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name
    steps = train_logs(made)
    assert len(steps) == 3 and all(math.isfinite(value) for log in made.state.log_history for value in log.values())
    assert all(log["guard/skipped_steps"] == 0 for log in steps)


@pytest.mark.parametrize("optim", WORKING)
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, optim):
    """Not the weights (by decay or momentum), and nothing that the optimizer remembers."""
    model, snapshots = tiny.causal_lm(sharpness=1.0), Snapshots()
    model.register_forward_hook(poison_second)
    made = trainer(
        tmp_path,
        model=model,
        optim=optim,
        max_steps=3,
        max_grad_norm=1.0,
        weight_decay=0.1,
        kwargs={"callbacks": [snapshots]},
    )
    snapshots.made, snapshots.seen = made, []
    made.train()
    first, second, third = snapshots.seen
    for before, after in zip(first, second, strict=True):
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(not torch.equal(second[0][name], third[0][name]) for name in second[0])
    assert all(p.isfinite().all() for p in made.model.parameters())
    assert [h["guard/skipped_steps"] for h in made.state.log_history if "guard/skipped_steps" in h] == [0, 1, 1]


@pytest.mark.parametrize("optim", REFUSED)
def test_an_optimizer_whose_package_is_missing_is_refused_by_name(tmp_path, optim, monkeypatch):
    installed = requirements.installed
    monkeypatch.setattr(requirements, "installed", lambda module: module != "bitsandbytes" and installed(module))
    with pytest.raises((ImportError, ValueError), match=REFUSED[optim]):
        trainer(tmp_path, optim=optim).train()
