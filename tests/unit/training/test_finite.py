"""Weights that are not finite are found, whatever holds them, and the last finite ones on the disk are named."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerState

from online_dpo.errors import TrainingDivergedError
from online_dpo.training.finite import FiniteWeights, describe_not_finite, last_finite_checkpoint


def model(**numbers: float) -> nn.Linear:
    """A layer with buffers of these numbers."""
    layer = nn.Linear(2, 3)
    for name, number in numbers.items():
        layer.register_buffer(name, torch.full((4,), number))
    return layer


def weights_of(layer: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> FiniteWeights:
    finite = FiniteWeights(torch.device("cpu"), lambda: optimizer)
    finite.add("the policy", layer)
    return finite


def check(finite: FiniteWeights, folder: Path, step: int = 3) -> None:
    state = TrainerState(global_step=step)
    finite.check(state, str(folder), "Before a save", agree=True)


def checkpoint(folder: Path, step: int, number: float, name: str = "model.safetensors") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.tensor([1.0, number])}, path / name)
    return path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_the_first_bad_tensor_is_named_with_how_many_numbers(dtype: torch.dtype, number: float) -> None:
    bad = torch.ones(3, 5, dtype=dtype)
    assert describe_not_finite([("a", bad), ("b", bad)]) is None
    bad[1, 2:] = number
    named = [("a", torch.ones(2)), ("ids", torch.ones(2, dtype=torch.long)), ("b", bad), ("c", bad)]
    assert describe_not_finite(named) == "b holds 3 of 15 numbers that are NaN or infinite"


def test_the_largest_finite_numbers_are_finite() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert describe_not_finite([("a", torch.full((100,), torch.finfo(dtype).max, dtype=dtype))]) is None
    assert describe_not_finite([("empty", torch.ones(0)), ("scalar", torch.tensor(2.0))]) is None
    assert describe_not_finite([("meta", torch.full((2,), math.nan, device="meta"))]) is None
    assert describe_not_finite([("a", torch.tensor(math.nan))]) == "a holds 1 of 1 numbers that are NaN or infinite"
    assert describe_not_finite([]) is None


def test_nothing_is_trained_from_weights_that_are_not_finite() -> None:
    layer = model()
    weights_of(layer).check_start()
    with torch.no_grad():
        layer.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"start from are not finite: `bias` of the policy holds 1 of 3 .*; give a mo"):
        weights_of(layer).check_start()
    frozen = FiniteWeights(torch.device("cpu"), lambda: None)
    frozen.add("the reference", layer, frozen=True)
    with pytest.raises(ValueError, match="`bias` of the reference"):
        frozen.check_start()


def test_buffers_count_unless_they_hold_infinities_by_design(tmp_path: Path) -> None:
    layer = model(mask=-math.inf, mean=0.0)
    finite = weights_of(layer)
    finite.check_start()
    check(finite, tmp_path)
    layer.mean[2] = math.inf
    with pytest.raises(TrainingDivergedError, match="`mean` of the policy holds 1 of 4"):
        check(finite, tmp_path)


def test_a_frozen_model_is_checked_at_the_start_alone(tmp_path: Path) -> None:
    reference = model()
    finite = weights_of(model())
    finite.add("the reference", reference, frozen=True)
    finite.check_start()
    nn.init.constant_(reference.bias, math.nan)
    check(finite, tmp_path)
    finite.add("the reference that follows", reference)
    with pytest.raises(TrainingDivergedError, match="`bias` of the reference that follows"):
        check(finite, tmp_path)


def test_the_state_of_the_optimizer_counts(tmp_path: Path) -> None:
    layer = model()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    finite = weights_of(layer, optimizer)
    layer.weight.grad, layer.bias.grad = torch.ones(3, 2), torch.full((3,), 1e30)  # its square is beyond fp32
    optimizer.step()
    assert layer.bias.isfinite().all()
    with pytest.raises(TrainingDivergedError, match="the optimizer's `exp_avg_sq` of `bias` holds 3 of 3 numbers"):
        check(finite, tmp_path)
    state = TrainerState(global_step=3)
    finite.check(state, str(tmp_path), "Before a save", agree=False, optimizer=False)
    assert finite.found


def test_the_message_names_the_last_finite_weights_on_the_disk(tmp_path: Path) -> None:
    layer = model()
    nn.init.constant_(layer.weight, math.inf)
    finite = weights_of(layer)
    with pytest.raises(TrainingDivergedError) as caught:
        check(finite, tmp_path)
    assert str(caught.value) == (
        "Before a save, after step 3, the weights are not finite: `weight` of the policy holds 6 of 6 numbers that are "
        "NaN or infinite. They were not saved. No checkpoint has finite weights. Try a lower learning rate, gradient "
        "clipping (`max_grad_norm`), or bf16 or fp32 in place of fp16."
    )
    checkpoint(tmp_path, 2, 0.5)
    with pytest.raises(TrainingDivergedError, match=re.escape(f"finite weights are in {tmp_path}/checkpoint-2. Try")):
        check(finite, tmp_path)


def test_a_checkpoint_is_read_to_find_out(tmp_path: Path) -> None:
    assert last_finite_checkpoint(tmp_path / "none") is None
    nine = checkpoint(tmp_path, 9, 0.5)
    ten = checkpoint(tmp_path, 10, 2.0, "adapter_model.safetensors")
    assert last_finite_checkpoint(tmp_path) == ten
    checkpoint(tmp_path, 11, math.nan)
    (tmp_path / "checkpoint-12").mkdir()
    torn = checkpoint(tmp_path, 13, 1.0) / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-3])
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-14").write_text("a file")
    assert last_finite_checkpoint(tmp_path) == ten
    save_file({"weight": torch.tensor([math.inf])}, ten / "model-00002-of-00002.safetensors")  # one of several
    assert last_finite_checkpoint(tmp_path) == nine
