"""Rows in segments: attention without masks on a CPU, against one sequence at a time."""

import pytest
import torch

from online_dpo.modeling.attention import segments
from online_dpo.modeling.attention.choice import use_segments
from online_dpo.modeling.attention.masks import attention_inputs
from online_dpo.modeling.loading import disable_dropout
from online_dpo.modeling.logprobs import row_logprobs
from online_dpo.packing.pack import pack_groups
from support import tiny
from support.single_sequences import groups, oracle, ready


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("capacity", [0, 200])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_in_segments_equal_single_sequences(family, capacity, checkpointing, monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST", 1)
    calls = []
    segment = segments._row
    monkeypatch.setattr(segments, "_row", lambda *given: calls.append(given[3]) or segment(*given))
    model, plain, made = ready(tiny.causal_lm(family)), tiny.causal_lm(family), groups()
    use_segments(model)
    if checkpointing:
        disable_dropout(model)
        model.train()
        tiny.checkpoint_layers(model)
    got = row_logprobs(model, pack_groups(made, [], True, capacity)).token_logps_M
    expected, _ = oracle(plain, made)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weight_M = torch.linspace(-1, 1, len(expected))
    (got * weight_M).sum().backward()
    (expected * weight_M).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm(), name
    windows = family in ("gemma2", "mistral")  # they are read with a mask
    assert bool(calls) != windows
    if capacity and calls:
        assert max(map(len, calls)) > 4  # several trees in a row


@torch.no_grad()
def test_segments_begin_with_long_rows():
    for length, expected in ((300, 0), (400, 2)):
        model, group = (
            tiny.causal_lm(max_position_embeddings=512),
            tiny.group(tiny.prompts((length,))[0], [[5, 6], [7]]),
        )
        use_segments(ready(model))
        rows = pack_groups([group], [], True)
        found = attention_inputs(model, rows.tokens)["segments"]
        assert (found is None) == (expected == 0)
        if found is not None:
            assert found == [[(0, 0, 0, 400, 0), (0, 400, 400, 402, 400), (0, 400, 402, 403, 402)]]
        torch.testing.assert_close(row_logprobs(model, rows).token_logps_M, oracle(model, [group])[0])
