"""The package runs from a folder on the path, as on a machine where it cannot be installed."""

import importlib.metadata

import pytest

from online_dpo import __version__
from online_dpo.doctor.checks.versions import versions
from support.training import trainer


@pytest.fixture
def not_installed(monkeypatch):
    """Nothing knows of a distribution of this name."""
    from_name = importlib.metadata.Distribution.from_name.__func__

    def without_ours(cls, name):
        if name == "online-dpo":
            raise importlib.metadata.PackageNotFoundError(name)
        return from_name(cls, name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", classmethod(without_ours))
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("online-dpo")


def test_a_run_saves_and_goes_on(tmp_path, not_installed):
    fields = dict(max_steps=2, save_strategy="steps", save_steps=1)
    made = trainer(tmp_path, **fields)
    made.train()
    made.save_model(str(tmp_path / "final"))
    made.create_model_card()
    assert f"online-dpo {__version__}" in (tmp_path / "README.md").read_text()
    again = trainer(tmp_path, **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2


def test_the_doctor_says_so(not_installed):
    findings = list(versions(None))  # it looks at packages only
    assert any("runs from a folder and is not installed" in finding.found for finding in findings)
