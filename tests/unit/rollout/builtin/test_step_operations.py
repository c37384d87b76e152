"""How many operations and kernels a decoding step has at 24 layers, on a GPU, counted without one."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[4] / "benchmarks"))

import compiled_layers  # noqa: E402
import decoding_operations  # noqa: E402
from decoding_operations import Case  # noqa: E402

MOST_KERNELS = 600
MOST_UNCOMPILED = 1250  # of 1,526 without adapters, 2,414 with
SMALL = Case("qwen2.5-0.5b", groups=4, completions=2, prompt=16, width=64)
LAYERS = 24


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("weights", decoding_operations.WEIGHTS)
def test_operations_of_a_step_that_is_not_compiled(weights, lora):
    case = replace(SMALL, weights=weights, lora=lora)
    two, three = (decoding_operations.count(replace(case, layers=n)) for n in (2, 3))
    a_layer = three["operations"] - two["operations"]
    assert two["operations"] + (LAYERS - 2) * a_layer <= MOST_UNCOMPILED
    converted = three["by_kind"]["casts"]
    assert converted["read"] < three["floor_bytes"]["cache"] + 4 * three["floor_bytes"]["logits"], "no weight, no cache"


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs Triton, but no card")
@pytest.mark.parametrize("lora", [False, True])
def test_kernels_of_a_compiled_step(lora):
    case = Case("qwen2.5-0.5b", lora=lora)
    found = compiled_layers.kernels(case, compiled_layers.beside_layers(case))
    assert found["step"] <= MOST_KERNELS
    assert sum(call.startswith("extern_kernels") for call in found["layer_calls"]) <= 11
