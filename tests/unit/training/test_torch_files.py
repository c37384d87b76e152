"""Files for `torch.load` in a checkpoint that nothing vouches for."""

import pickle

import numpy as np
import pytest
import torch

from online_dpo.errors import CheckpointError
from online_dpo.training.torch_files import check_loads


class Owned:
    def __reduce__(self):
        return open, ("owned", "w")


def save_whole(folder):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 2, "base_lrs": [0.1]}, folder / "scheduler.pt")
    random_state = {"python": (3, (1, 2), None), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(random_state, folder / "rng_state.pth")


def test_what_a_run_writes_loads(tmp_path):
    save_whole(tmp_path)
    check_loads(tmp_path)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["pickle", "object", "cut", "empty", "text"])
def test_what_could_run_code_or_is_damaged_is_named_and_not_loaded(tmp_path, monkeypatch, name, damage):
    monkeypatch.chdir(tmp_path)
    save_whole(tmp_path)
    torch.save({"a": Owned()}, tmp_path / "object")
    data = {
        "pickle": pickle.dumps(Owned()),
        "object": (tmp_path / "object").read_bytes(),
        "cut": (tmp_path / "optimizer.pt").read_bytes()[:500],
        "empty": b"",
        "text": b"hello\n" * 100,
    }[damage]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"cannot be resumed from: {name} is damaged, or holds other things"):
        check_loads(tmp_path)
    assert not (tmp_path / "owned").exists()
