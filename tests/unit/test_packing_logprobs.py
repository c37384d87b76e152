"""Rows and their log-probabilities, against the model run on one sequence at a time without padding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from online_dpo.logprobs import row_logprobs
from online_dpo.models import accepts_argument, disable_dropout
from online_dpo.packing import halve, pack_groups, pack_pairs, split_evenly, stand_in
from online_dpo.types import Pair

COMPLETIONS = [[[5, 6, 7, 1], [8, 9]], [[10, 11, 12, 13, 14, 1], [15, 1]], [[1], [20, 21, 22]]]
LENGTHS = (9, 2, 4)


def make_pairs():
    groups = [tiny.group(p, c) for p, c in zip(tiny.prompts(LENGTHS), COMPLETIONS, strict=True)]
    return [
        Pair(g, chosen=i % 2, rejected=1 - i % 2, chosen_score=2.0 + i, rejected_score=0.5)
        for i, g in enumerate(groups)
    ]


def alone(model, prompt, completion):
    """The oracle: one sequence, no padding, no mask, no positions, whole log-softmax."""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, torch.tensor(completion)[:, None])[:, 0], entropy


def pad_right(rows):
    """The same sequences with the padding on the other side, completions no longer right-aligned."""
    ids, mask, positions = (torch.zeros_like(rows.ids_RT) for _ in range(3))
    for r in range(len(ids)):
        n = int(rows.attention_mask_RT[r].sum())
        ids[r, :n], mask[r, :n], positions[r, :n] = rows.ids_RT[r, -n:], 1, torch.arange(n)
    return ids, mask, positions


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padded_rows_equal_single_sequences_on_either_side(family):
    model, pairs = tiny.causal_lm(family), make_pairs()
    rows = pack_pairs(pairs, tiny.PAD)
    sequences = [(p.group.prompt.token_ids, p.chosen_completion.token_ids) for p in pairs]
    sequences += [(p.group.prompt.token_ids, p.rejected_completion.token_ids) for p in pairs]
    with torch.no_grad():
        got = row_logprobs(model, rows)
        ids, mask, positions = pad_right(rows)
        right = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float().log_softmax(-1)
        for r, (prompt, completion) in enumerate(sequences):
            logps, entropy = alone(model, prompt, completion)
            own = rows.completion_mask_RC[r]
            torch.testing.assert_close(got.token_logps_RC[r][own], logps.float(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(got.entropy_RC[r][own], entropy.float(), atol=1e-5, rtol=1e-5)
            assert got.token_logps_RC[r][~own].eq(0).all() and got.entropy_RC[r][~own].eq(0).all()
            assert got.logps_R[r].item() == pytest.approx(logps.sum().item(), abs=1e-4)
            start = len(prompt) - 1
            of_right = right[r, start : start + len(completion)].gather(-1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(of_right, logps.float(), atol=1e-5, rtol=1e-5)


def test_values_of_the_rows():
    pair = make_pairs()[1]
    rows = pack_pairs([pair], 0)
    prompt = list(pair.group.prompt.token_ids)
    assert rows.ids_RT.tolist() == [[0, 0, 0, 0, *prompt, 15, 1], [*prompt, 10, 11, 12, 13, 14, 1]]
    assert rows.attention_mask_RT.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [1] * 8]
    assert rows.positions_RT.tolist() == [[0, 0, 0, 0, 0, 1, 2, 3], list(range(8))]
    assert rows.completion_mask_RC.tolist() == [[False] * 4 + [True] * 2, [True] * 6]
    assert rows.chosen_N.tolist() == [0] and rows.rejected_N.tolist() == [1] and rows.weight_N.tolist() == [1.0]
    assert rows.score_R.tolist() == [3.0, 0.5]
    assert rows.completion_ids_RC[1].tolist() == [10, 11, 12, 13, 14, 1]


def test_groups_and_pairs_point_at_the_same_completions():
    pairs = make_pairs()
    groups = [p.group for p in pairs]
    rows = pack_groups(groups, [pairs[2], pairs[1]], tiny.PAD)
    for n, pair in enumerate((pairs[2], pairs[1])):
        for index, completion in (
            (rows.chosen_N[n], pair.chosen_completion),
            (rows.rejected_N[n], pair.rejected_completion),
        ):
            assert rows.completion_ids_RC[index][rows.completion_mask_RC[index]].tolist() == list(completion.token_ids)


def test_halves_give_the_same_log_probabilities():
    model = tiny.causal_lm()
    rows = pack_pairs(make_pairs(), tiny.PAD)
    with torch.no_grad():
        whole = row_logprobs(model, rows).logps_R
        parts = [(half, row_logprobs(model, half).logps_R) for half in halve(rows)]
    chosen = torch.cat([logps[half.chosen_N] for half, logps in parts])
    rejected = torch.cat([logps[half.rejected_N] for half, logps in parts])
    torch.testing.assert_close(chosen, whole[rows.chosen_N], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(rejected, whole[rows.rejected_N], atol=1e-5, rtol=1e-6)
    assert torch.cat([half.score_R[half.chosen_N] for half, _ in parts]).tolist() == [2.0, 3.0, 4.0]


def test_stand_in_weighs_nothing_and_is_finite():
    rows = stand_in(tiny.EOS)
    assert rows.weight_N.tolist() == [0.0]
    assert row_logprobs(tiny.causal_lm(), rows).logps_R.isfinite().all()


@given(count=st.integers(0, 40), parts=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_split_keeps_every_pair_in_order_and_even(count, parts):
    pieces = split_evenly(list(range(count)), parts)  # type: ignore[arg-type]
    assert [item for piece in pieces for item in piece] == list(range(count)) and len(pieces) == parts
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_bf16_stays_within_the_models_own_error():
    model = tiny.causal_lm().to(torch.bfloat16)
    rows = pack_pairs(make_pairs(), tiny.PAD)
    with torch.no_grad():
        exact = row_logprobs(model.float(), rows).logps_R
        half = row_logprobs(model.to(torch.bfloat16), rows)
    assert half.token_logps_RC.dtype == torch.float32
    torch.testing.assert_close(half.logps_R, exact, atol=0.5, rtol=0.05)


def test_wider_padding_changes_nothing():
    model, rows = tiny.causal_lm("gpt2"), pack_pairs(make_pairs(), tiny.PAD)

    def widen(tensor, value=0):
        return torch.nn.functional.pad(tensor, (7, 0), value=value)

    wide = replace(
        rows,
        ids_RT=widen(rows.ids_RT),
        attention_mask_RT=widen(rows.attention_mask_RT),
        positions_RT=widen(rows.positions_RT),
        completion_mask_RC=widen(rows.completion_mask_RC, False),
    )
    with torch.no_grad():
        narrow, widened = row_logprobs(model, rows), row_logprobs(model, wide)
    torch.testing.assert_close(narrow.logps_R, widened.logps_R, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(narrow.entropy_RC.sum(1), widened.entropy_RC.sum(1), atol=1e-5, rtol=1e-6)


def test_wrappers_do_not_hide_what_a_model_takes():
    model = tiny.causal_lm("gpt2")
    assert accepts_argument(torch.compile(model), "position_ids") and accepts_argument(model, "logits_to_keep")
    assert not accepts_argument(model, "no_such_argument")


def test_dropout_is_switched_off_in_modules_and_in_numbers():
    model = tiny.causal_lm("gpt_neox", attention_dropout=0.5, hidden_dropout=0.5).train()
    ids = torch.arange(4, 24)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits) and model.config.hidden_dropout == 0.5
