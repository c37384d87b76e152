"""Work that does not fit in memory is divided, with the same results, and an error that is left says what to lower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from online_dpo.errors import OnlineDPOError, ScoringError, error_text, is_out_of_memory
from online_dpo.foreign import foreign
from online_dpo.modeling.memory import DoesNotFit, Halving, in_memory, named_memory_error

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "400 bytes. Error code 12 (Cannot allocate memory)\nException raised from alloc_cpu"
)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    torch.OutOfMemoryError(),
    MemoryError(),
    CPU,
]


class Room:
    """Doubles numbers, at most ``most`` at a time."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.sizes = most, error, []

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.sizes.append(len(numbers))
        if len(numbers) > self.most:
            raise self.error
        return [2 * number for number in numbers]


def test_what_torch_raises_on_this_cpu_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**14)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as python:
        bytearray(10**18)
    assert is_out_of_memory(python.value)
    others: list[Any] = [RuntimeError("shapes differ"), ValueError("out of memory"), KeyboardInterrupt()]
    assert not any(map(is_out_of_memory, others))


@pytest.mark.parametrize("error", ERRORS)
def test_items_are_halved_until_they_fit_and_stay_in_order(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    room, halving = Room(3, error), Halving("Judge `j`")
    assert halving(range(10), room) == [2 * number for number in range(10)]
    assert room.sizes == [10, 5, 2, 2, 2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"Judge `j` ran out of memory ({error_text(error, first_line=True)}); it goes on with {most} at a time."
        for most in (5, 2)
    ]
    room.sizes.clear()
    assert halving(range(3), room) == [0, 2, 4] and room.sizes == [2, 1]


@pytest.mark.parametrize("error", ERRORS)
def test_one_that_does_not_fit_says_what_to_lower(error: Exception) -> None:
    with pytest.raises(DoesNotFit, match=r"^It ran out of memory with 1 at a time \(.*\)\. Lower this\.$") as caught:
        Halving("It", "Lower this.")([1, 2], Room(0, error))
    assert error_text(error, first_line=True) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DoesNotFit, match="with 2 at a time"):
        Halving("It", splits=False)([1, 2], Room(1, error))


def test_other_errors_pass_and_nothing_gives_nothing() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        Halving("It")([1, 2], Room(1, RuntimeError("shapes differ")))
    assert Halving("It")([], Room(0, MemoryError())) == []


def test_an_attempt_tells_whether_it_fitted() -> None:
    with in_memory() as fits:
        pass
    with in_memory() as fails:
        raise CPU
    assert fits.fits and not fails.fits


@pytest.mark.parametrize("error", ERRORS)
def test_it_passes_through_code_of_others_unwrapped(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, foreign("Reward model `rm`"):
        raise error
    assert caught.value is error and not isinstance(error, ScoringError)


def test_the_error_for_a_person_is_one_line_of_our_own() -> None:
    error = named_memory_error(CPU, "in step 3")
    assert isinstance(error, OnlineDPOError) and is_out_of_memory(error) and "\n" not in str(error)
    assert str(error).startswith("Memory ran out in step 3: [enforce fail") and "Exception raised" not in str(error)
    assert "Lower `per_device_train_batch_size`" in str(error)
