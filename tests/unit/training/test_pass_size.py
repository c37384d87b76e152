"""`PassSize`, built alone: the free memory of a GPU is a stub, models and optimizers are real."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from online_dpo.errors import CheckpointError
from online_dpo.packing.pack import pack_pairs, stand_in
from online_dpo.runs.events import listening
from online_dpo.sizing.plan import Plan
from online_dpo.sizing.shape import shape_of
from online_dpo.sizing.tokens import SHARE, pass_bytes
from online_dpo.training import pass_size
from online_dpo.training.pass_size import PassSize, fields_of, still_to_come
from online_dpo.types import Pair
from support import tiny
from support.training import config

CUDA, MIB = torch.device("cuda"), 2**20


def rows(lengths=(40, 60), answers=(30, 50)):
    """Of two groups; the first has 120 tokens, the second 140: 280 in rows, with padding."""
    groups = [tiny.group(prompt, [[7] * n for n in answers]) for prompt in tiny.prompts(lengths)]
    return pack_pairs([Pair(group, 0, 1) for group in groups], True)


def built(tmp_path, free, model=None, optimizer=None, name="none", device=CUDA, **fields):
    model = tiny.causal_lm(intermediate_size=4096) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    args, sharding = config(tmp_path, **fields), SimpleNamespace(name=name)
    size = PassSize(args, sharding, lambda: optimizer, device, lambda device: free)
    if device.type == "cuda":  # the configuration of a test is that of a CPU, whose default is less
        default = property(lambda self: self.max_tokens_per_pass or 16384)
        args.__class__ = type("OnAGPU", (type(args),), {"tokens_per_pass": default})
    return size, model


def settled(tmp_path, free, **options):
    size, model = built(tmp_path, free, **options)
    size.settle(model, rows())
    return size.tokens


def test_the_pass_takes_what_is_free_beside_gradients_and_the_optimizer_s_state(tmp_path):
    size, model = built(tmp_path, 64 * MIB)
    weights = sum(p.nbytes for p in model.parameters())
    assert size.is_open and size.tokens == 16384
    told = []
    with listening(told.append):
        size.settle(model, rows())
        size.settle(model, rows())  # once
    [event] = told
    free = 64 * MIB - 2 * weights  # no gradient yet, and SGD may keep a momentum
    assert event.kind == "passes" and event.facts["tokens"] == size.tokens and event.facts["free"] == free
    plan = Plan(shape_of(model.config.to_dict()), bf16=False, gradient_checkpointing=False)

    def needed(tokens):
        return pass_bytes(replace(plan, tokens_per_pass=tokens * 280 // 260), 140)

    assert 64 < size.tokens < 16384 and event.facts["bytes"] == needed(size.tokens)
    assert needed(size.tokens) <= SHARE * free < needed(size.tokens + 64)
    assert f"up to {size.tokens} tokens" in event.message and "max_tokens_per_pass" in event.message
    assert not size.is_open


def test_more_room_gives_larger_passes_up_to_the_default(tmp_path):
    found = [settled(tmp_path, free * MIB) for free in (0, 48, 64, 128, 4096)]
    assert found == sorted(found) and found[0] == 64 and found[-1] == 16384 and len(set(found)) == 5
    assert settled(tmp_path, 64 * MIB, gradient_checkpointing=True) > found[2]


@pytest.mark.parametrize("options", [dict(max_tokens_per_pass=777), dict(device=torch.device("cpu"))])
def test_what_the_user_sets_stays_and_a_cpu_keeps_its_default(tmp_path, options):
    size, model = built(tmp_path, 0, **options)
    before = size.tokens
    assert not size.is_open
    size.settle(model, rows())
    assert size.tokens == before == size.args.tokens_per_pass
    size.save(tmp_path, 0)
    assert not (tmp_path / PassSize.FILE).exists()


def test_too_little_room_for_anything_is_a_warning(tmp_path, caplog):
    size, model = built(tmp_path, 0)
    size.settle(model, rows())
    [record] = caplog.records
    assert record.levelname == "WARNING" and "may not be enough for one group: Lower `per_dev" in record.getMessage()


def test_rows_of_flex_attention_are_no_longer_than_a_pass(tmp_path):
    size, model = built(tmp_path, 64 * MIB)
    assert size.row_capacity == 0
    size.fills_rows = True
    assert size.row_capacity == 16384
    size.settle(model, rows())
    assert size.row_capacity == size.tokens < 16384


def test_a_rank_without_pairs_takes_the_lengths_of_the_others(tmp_path, monkeypatch):
    expected = settled(tmp_path, 64 * MIB)
    lengths = pass_size._lengths(rows())
    for on_ranks in ([lengths, None], [None, lengths]):
        size, model = built(tmp_path, 64 * MIB)
        gathered = iter([on_ranks, None])
        monkeypatch.setattr(pass_size, "from_every_rank", lambda own: next(gathered) or [own])  # noqa: B023
        size.settle(model, stand_in(True))
        assert size.tokens == expected


def test_a_first_step_without_pairs_says_nothing_of_the_next_one_s_passes(tmp_path):
    size, model = built(tmp_path, 64 * MIB)
    size.settle(model, stand_in(True))
    assert size.is_open and size.tokens == 16384
    size.settle(model, rows())
    assert size.tokens == settled(tmp_path, 64 * MIB)


def test_a_resumed_run_takes_the_same_passes_where_they_fit(tmp_path):
    first, model = built(tmp_path, 64 * MIB)
    first.settle(model, rows())
    first.save(tmp_path, 1)
    assert not (tmp_path / PassSize.FILE).exists(), "rank 0 writes"
    first.save(tmp_path, 0)
    for free, same in ((60, True), (4096, True), (30, False)):  # another card, or more beside it
        again, model = built(tmp_path, free * MIB)
        again.restore(tmp_path, 0)
        again.save(tmp_path, 0)  # before its first step
        again.settle(model, rows())
        assert (again.tokens == first.tokens) == same
        assert same or again.tokens < first.tokens
    chosen = built(tmp_path, 0, max_tokens_per_pass=5)[0]
    chosen.restore(tmp_path, 0)
    assert chosen.tokens == 5
    (tmp_path / PassSize.FILE).write_text('{"tokens": "many"}')
    with pytest.raises(CheckpointError, match=PassSize.FILE):
        built(tmp_path, 0)[0].restore(tmp_path, 0)


@pytest.mark.parametrize(("optimizer", "state"), [(torch.optim.AdamW, 8), (torch.optim.SGD, 4)])
def test_what_is_still_to_come(optimizer, state):
    model = tiny.causal_lm()
    numbers = sum(p.numel() for p in model.parameters())
    made = Accelerator(cpu=True).prepare_optimizer(
        optimizer(model.parameters(), lr=0.1, **({"momentum": 0.9} if state == 4 else {}))
    )
    assert still_to_come(model, made, "none") == (4 + state) * numbers
    assert still_to_come(model, made, "zero2") == 4 * numbers, "DeepSpeed makes the state at its start"
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    assert still_to_come(model, made, "none") == state * numbers
    made.optimizer.step()
    assert still_to_come(model, made, "none") == 0
    made.optimizer.zero_grad()
    assert still_to_come(model, made, "none") == 4 * numbers
    for parameter in list(model.parameters())[1:]:
        parameter.requires_grad_(False)
    assert still_to_come(model, made, "none") == 4 * next(model.parameters()).numel()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_models_of_every_kind(tmp_path, family):
    assert 64 <= settled(tmp_path, 64 * MIB, model=tiny.causal_lm(family)) <= 16384


def test_a_model_whose_config_has_names_of_its_own(tmp_path):
    model = tiny.causal_lm("gpt2")
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    own = SimpleNamespace(model_type="own", tie_word_embeddings=True)
    own.get_text_config = lambda: own
    model.config = own
    found = fields_of(model)
    assert (found["hidden_size"], found["num_hidden_layers"]) == (hidden, layers)
    assert 64 <= settled(tmp_path, 64 * MIB, model=model) <= 16384
