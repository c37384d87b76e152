"""The state of a run beside weights and optimizer: each part finds again what it wrote."""

import json

import pytest

from online_dpo.checkpoints.codec import from_json
from online_dpo.errors import CheckpointError
from online_dpo.modeling.reference import FrozenReference, SyncedReference
from online_dpo.objective.beta import Beta
from online_dpo.training.run_state import RunState
from online_dpo.training.step_guard import GuardCounts
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
    assert json.loads((tmp_path / "beta.json").read_text()) == {"kind": "AdaptedBeta", "beta": 0.25}

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


@pytest.mark.parametrize("content", ["", "{", '{"beta": "0.1"}', '{"beta": NaN}', '{"beta": -1.0}', "[" * 50_000])
def test_a_damaged_beta_is_one_line(tmp_path, content):
    (tmp_path / "beta.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"beta\.json is damaged \(.*\)\. Give another checkpoint\.$"):
        beta(tmp_path, 0.1).restore(tmp_path, rank=0)


@pytest.mark.parametrize("content", [b"", b"\x80\x04cbuiltins\nprint\n.", b"\xff" * 40])
def test_a_damaged_reference_is_one_line(tmp_path, content):
    (tmp_path / "reference.safetensors").write_bytes(content)
    reference = SyncedReference(tiny.causal_lm(), tiny.causal_lm(), alpha=0.5, every=1, description="")
    with pytest.raises(CheckpointError, match=r"reference\.safetensors is damaged \(.*\)\. Give another"):
        reference.restore(tmp_path, rank=0)


def test_a_reference_of_another_shape_is_refused(tmp_path):
    other = tiny.causal_lm(num_hidden_layers=1)
    SyncedReference(other, tiny.causal_lm(num_hidden_layers=1), 0.5, 1, "").save(tmp_path, rank=0)
    with pytest.raises(CheckpointError, match="holds other weights than the reference has"):
        SyncedReference(tiny.causal_lm(), tiny.causal_lm(), 0.5, 1, "").restore(tmp_path, rank=0)


def test_a_part_whose_file_is_not_there_starts_anew_and_says_so(tmp_path, caplog):
    """`Needs` refuses such a checkpoint before, unless `resume_anyway` has let it pass."""
    part = beta(tmp_path, 0.3)
    state = RunState()
    state.add(part)
    state.restore(tmp_path, rank=0)
    assert part.at(0.0) == 0.3 and "lacks beta.json: what it would say starts anew" in caplog.text


def test_guard_counts_of_an_earlier_version_are_read():
    assert from_json(GuardCounts, {"trained_steps": 3}) == GuardCounts(3)
