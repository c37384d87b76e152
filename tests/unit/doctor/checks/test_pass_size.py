"""What the memory of a GPU is compared with, where the run chooses the tokens of its passes itself."""

from online_dpo.doctor.checks.memory import FEWEST, fitting
from online_dpo.sizing.plan import Plan
from online_dpo.sizing.shape import MODELS

GIB = 2**30


def plan_with(tokens):
    return Plan(MODELS["1.5B"], gradient_checkpointing=False, tokens_per_pass=tokens)


def test_a_run_that_makes_its_passes_smaller_is_not_called_too_large():
    found = [fitting(plan_with, 16384, free * GIB).tokens_per_pass for free in (200, 80, 48, 8)]
    assert found[0] == 16384 and found == sorted(found, reverse=True) and 2048 <= found[1] < 16384
    assert found[-1] == FEWEST, "which does not fit either"
