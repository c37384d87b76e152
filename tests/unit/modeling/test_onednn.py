"""Products through oneDNN: the same numbers, only where they may, and nothing left behind."""

import pytest
import torch
from torch import nn

from online_dpo.modeling.onednn import linear, onednn_linears, supports_onednn
from support import tiny

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("rows", [1, 3, 16, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rows, bias):
    torch.manual_seed(rows)
    layer = nn.Linear(96, 200, bias=bias)
    input = torch.randn(2, rows, 96)
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
    with torch.no_grad():
        expected = layer(input)
        torch.testing.assert_close(linear(input, layer.weight, layer.bias), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(linear(input, packed, layer.bias), expected, rtol=1e-5, atol=1e-5)


@needs_onednn
@torch.no_grad()
def test_pack_uses_the_weights_as_they_are_at_the_start_and_no_pack_the_live_ones():
    layer, input = nn.Linear(8, 4), torch.randn(3, 8)
    before = layer(input)
    for pack in (True, False):
        with onednn_linears(layer, pack=pack):
            layer.weight += 1
            torch.testing.assert_close(layer(input), before if pack else before + input.sum(-1, keepdim=True))
            layer.weight -= 1
    assert "forward" not in vars(layer)


@needs_onednn
def test_each_use_sees_the_weights_of_its_time():
    model, ids = tiny.causal_lm("qwen2"), torch.arange(12)[None]
    for _ in range(2):
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            with onednn_linears(model, pack=True):
                assert "forward" in vars(model.lm_head)
                torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
            for parameter in model.parameters():
                parameter += 0.1
    model(input_ids=ids).logits.sum().backward()  # the model trains as before
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_changes_where_it_may_not():
    assert not supports_onednn(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not supports_onednn(torch.zeros(2, 2, device="meta"))
    assert not supports_onednn(nn.Buffer(torch.zeros(2, 2)).as_subclass(type("Shard", (torch.Tensor,), {})))

    class Special(nn.Linear): ...

    layer = nn.Linear(2, 2)
    for model in (layer.bfloat16(), Special(2, 2)):
        with onednn_linears(model, pack=True):
            assert "forward" not in vars(model)
    model = nn.Linear(2, 2)
    with torch.autocast("cpu"), onednn_linears(model, pack=True):
        assert "forward" not in vars(model)
    with onednn_linears(model, pack=False), onednn_linears(model, pack=True):  # the first stays
        assert "forward" in vars(model) or not supports_onednn(model.weight)
    assert "forward" not in vars(model)
    with pytest.raises(KeyError), onednn_linears(model, pack=False):
        raise KeyError
    assert "forward" not in vars(model)
