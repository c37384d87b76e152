"""What code of others changes in the process is put back."""

import logging
import os
import random
import sys
import threading

import pytest
import torch

from online_dpo.distributed.settings import kept_settings

CHANGES = {
    "the working folder": (lambda: os.chdir("/"), os.getcwd),
    "torch's default type": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "torch's default device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "torch's number of threads": (lambda: torch.set_num_threads(3), torch.get_num_threads),
    "the level below which nothing is logged": (lambda: logging.disable(30), lambda: logging.root.manager.disable),
    "torch's random state": (lambda: torch.manual_seed(8), lambda: torch.get_rng_state().tolist()),
}


@pytest.mark.parametrize(("name", "change", "read"), [(name, *pair) for name, pair in CHANGES.items()])
def test_what_is_changed_is_put_back_and_told_once(caplog, name, change, read):
    torch.manual_seed(7)
    torch.rand(3)
    before = read()
    for _ in range(2):
        with kept_settings(f"Reward function `of {name}`"):
            change()
            assert read() != before
        assert read() == before
    torch.set_default_device(None)
    assert [record.message for record in caplog.records] == [
        f"Reward function `of {name}` changed {name}, which is put back."
    ]


def test_it_is_put_back_after_an_error_as_well():
    before = os.getcwd()
    with pytest.raises(SystemExit), kept_settings("x"):
        os.chdir("/")
        raise SystemExit
    assert os.getcwd() == before


@pytest.mark.parametrize("seed", [3, 4], ids=["the run's own", "another"])
def test_a_seed_does_not_make_training_repeat_its_numbers(seed):
    torch.manual_seed(3)
    expected = [torch.rand(1).item() for _ in range(4)]
    torch.manual_seed(3)
    drawn = []
    for _ in range(4):
        drawn.append(torch.rand(1).item())
        with kept_settings("x"):
            torch.manual_seed(seed)
    assert drawn == expected


def test_numbers_that_are_drawn_stay_drawn():
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(2).tolist(), [random.random(), random.random()]
    torch.manual_seed(3)
    random.seed(3)
    drawn = []
    for _ in range(2):
        with kept_settings("x"):
            drawn.append((torch.rand(1).item(), random.random()))
    assert (list(zip(*drawn, strict=True))) == [tuple(part) for part in expected]


def test_gradient_and_inference_mode_end_with_the_call():
    with torch.no_grad():
        with kept_settings("x"):
            assert not torch.is_grad_enabled()
            torch.set_grad_enabled(True)
            left_on = torch.inference_mode()
            left_on.__enter__()
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    del left_on


def test_a_removed_working_folder_is_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    os.rmdir(tmp_path / "gone")
    with kept_settings("x"):
        pass


def test_hooks_for_errors_come_back() -> None:
    """Without them, Python starts no thread any more."""
    before = sys.excepthook, threading.excepthook
    with kept_settings("`words`"):
        sys.excepthook = threading.excepthook = None  # pyright: ignore[reportAttributeAccessIssue]
    assert (sys.excepthook, threading.excepthook) == before
