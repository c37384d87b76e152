"""The state of a run beside weights and optimizer: each part finds again what it wrote."""

import json

from online_dpo.modeling.reference import FrozenReference, SyncedReference
from online_dpo.objective.beta import Beta
from online_dpo.training.run_state import RunState
from support import tiny
from support.training import config


def beta(tmp_path, value):
    made = Beta(config(tmp_path, target_kl=5.0), lambda: None)
    made._value = value
    return made


def test_parts_are_saved_and_restored(tmp_path):
    policy, model = tiny.causal_lm(seed=1, sharpness=1.0), tiny.causal_lm(seed=2, sharpness=1.0)
    synced = SyncedReference(model, policy, alpha=0.5, every=1, description="")
    synced.update_after_step(1)
    state = RunState()
    state.add(beta(tmp_path, 0.25), synced)
    state.save(tmp_path, rank=0)
    assert json.loads((tmp_path / "beta.json").read_text()) == {"beta": 0.25}

    fresh = SyncedReference(tiny.causal_lm(seed=2, sharpness=1.0), policy, alpha=0.5, every=1, description="")
    other = beta(tmp_path, 0.1)
    again = RunState()
    again.add(other, fresh)
    again.restore(tmp_path, rank=0)
    assert other.at(0.0) == 0.25
    expected = dict(model.named_parameters())
    assert all(parameter.equal(expected[name]) for name, parameter in fresh.model.named_parameters())


def test_other_ranks_write_nothing_that_all_share(tmp_path):
    state = RunState()
    state.add(beta(tmp_path, 0.25), FrozenReference(tiny.causal_lm(), ""))
    state.save(tmp_path, rank=1)
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.pt"))
