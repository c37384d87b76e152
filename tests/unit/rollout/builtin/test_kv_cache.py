"""What a decoding step does with the cache of keys and values: its dtypes, and what it converts, copies and negates."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from online_dpo.rollout.builtin.decoding import Decoder
from online_dpo.rollout.builtin.static_decoding import StaticBuffers, StaticDecoder
from support import tiny

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [20, 21, 22, 23], [30, 31, 5]]
AUTOCAST, BF16, FP32 = "autocast", "bf16", "fp32"
DTYPES = {AUTOCAST: torch.bfloat16, BF16: torch.bfloat16, FP32: torch.float32}


class Operations(TorchDispatchMode):
    """The operations that are run inside, with the number of elements of what each returns."""

    def __init__(self):
        super().__init__()
        self.run = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.run.append((func, result.numel()))
        return result

    def largest(self, *funcs):
        return max((size for func, size in self.run if func in funcs), default=0)


def step(weights, static, family="llama"):
    """The cache after a prefill and two steps, and the operations of the second step."""
    model = tiny.causal_lm(family)
    if weights == BF16:
        model = model.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if weights == AUTOCAST else nullcontext():
        buffers = StaticBuffers()
        decoder = StaticDecoder(model, PROMPTS, 2, 8, buffers) if static else Decoder(model, PROMPTS, 2, 8)
        decoder.prefill()
        decoder.step(torch.tensor([9] * 8))
        with Operations() as operations:
            decoder.step(torch.tensor([7] * 8))
    return buffers.layers if static else decoder.kv_cache.layers, operations


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("weights", DTYPES)
def test_keys_and_values_are_kept_in_the_dtype_that_they_are_multiplied_in(weights, static):
    layers, operations = step(weights, static)
    for layer in layers.values():
        kept = (layer.prompt_keys, layer.prompt_values, layer.keys, layer.values)
        assert {tensor.dtype for tensor in kept} == {DTYPES[weights]}
    converted = operations.largest(torch.ops.aten._to_copy.default)
    # Scores and probabilities are converted, (8 sequences, 4 heads, slots); the cache, of head size 8, is not.
    slots = layers[0].prompt_keys.shape[2] + layers[0].keys.shape[2]
    assert converted <= max(8 * 4 * slots, 8 * 48), "nothing of the size of the cache is converted"


def test_under_autocast_a_step_reads_no_more_than_with_bf16_weights():
    """The bytes of keys and values: half of what fp32 keys take."""
    layers = {weights: step(weights, static=True)[0] for weights in DTYPES}
    size = {
        weights: sum(x.nbytes for layer in kept.values() for x in (layer.keys, layer.prompt_keys))
        for weights, kept in layers.items()
    }
    assert size[AUTOCAST] == size[BF16] == size[FP32] / 2


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_no_layer_negates_the_mask(family):
    _, operations = step(FP32, static=True, family=family)
    negated = [func for func, _ in operations.run if func is torch.ops.aten.bitwise_not.default]
    assert negated == []
