"""Several processes that do not work together are refused: each would train alone, into one folder."""

from __future__ import annotations

import pytest
import torch

from online_dpo.cli.main import main
from online_dpo.distributed.processes import SIZES, SLURM, Started, started_together
from support import training


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for variable in (*SIZES, "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.smoke
@pytest.mark.parametrize("variable", SIZES)
def test_whatever_started_them(tmp_path, monkeypatch, variable):
    """No process group is made for MPI's and SLURM's own variables without those of torchrun."""
    assert started_together() is None
    monkeypatch.setenv(variable, "1")
    assert started_together() is None
    training.config(tmp_path, use_cpu=False)
    monkeypatch.setenv(variable, "3")
    assert started_together() == Started(3, variable)
    with pytest.raises(ValueError) as error:
        training.config(tmp_path, use_cpu=False)
    assert f"3 processes were started ({variable}), but this one trains as one of 1, into the same folder" in str(
        error.value
    )
    together = variable == SLURM or torch.cuda.is_available()
    remedy = "`torchrun --nproc_per_node 3`" if together else "`use_cpu: true` (`--use_cpu`, `use_cpu=True`)"
    assert remedy in str(error.value)
    assert f"with the variable {variable} unset" in str(error.value)


@pytest.mark.parametrize("command", ["eval", "judge", "quickstart"])
def test_commands_that_run_in_one_process(monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 2 processes were started (WORLD_SIZE), and each of them would do all the work of")
    assert f"`online-dpo {command}`" in said and said.count("\n") == 1
