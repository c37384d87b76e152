"""The model itself, under whatever it is wrapped in."""

import pytest
import torch
from accelerate.utils import compile_regions

from online_dpo.modeling.introspection import unwrapped
from support import tiny


def with_adapter(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


WRAPPERS = {
    "nothing": lambda model: model,
    "an adapter": with_adapter,
    "torch.compile": torch.compile,
    "its regions compiled": compile_regions,
    "data parallelism": torch.nn.DataParallel,
    "an adapter, compiled": lambda model: torch.compile(with_adapter(model)),
    "an adapter, regions compiled": lambda model: compile_regions(with_adapter(model)),
    "data parallelism of an adapter": lambda model: torch.nn.DataParallel(with_adapter(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_found(name):
    model = tiny.causal_lm("llama")
    assert unwrapped(WRAPPERS[name](model)) is model
