"""From prompts to pairs, in whole optimizer steps: invariants 1, 6, 7 and 12 of docs/project/architecture."""

from collections import Counter

import pytest
import torch

from online_dpo import OnlineDPOTrainer
from online_dpo.data.collate import collate_prompts, prompts_from_batch
from online_dpo.errors import NothingTrainedError
from online_dpo.pairing.strategies import STRATEGIES
from online_dpo.types import Scores
from support import tiny
from support.training import config, dataset, recording, trainer, weights, word_reward


def first_step(made):
    """Micro-batches of the first optimizer step, as `Trainer` would fetch them."""
    loader = made.get_train_dataloader()
    return made.get_batch_samples(iter(loader), made.args.gradient_accumulation_steps, made.args.device)


def sequences(rows):
    """Prompt and completion of every completion, read back from the rows: what a model sees before its first token."""
    tokens, read = rows.tokens, []
    tree, branch, ids = (x.flatten() for x in (tokens.tree_RT, tokens.branch_RT, tokens.ids_RT))
    for source, target in zip(*(x.split(rows.length_S.tolist()) for x in (rows.source_M, rows.target_M)), strict=True):
        before = int(source[0])
        own = (tree == tree[before]) & (branch == 0) & (torch.arange(len(ids)) <= before)
        read.append((tuple(ids[own].tolist()), tuple(target.tolist())))
    return read


# invariant 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [None, {"no_repeat_ngram_size": 0}])
@pytest.mark.parametrize("num_completions", [2, 3, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_chosen_and_rejected_share_their_prompt_and_come_from_its_group(tmp_path, num_completions, extra, shared):
    calls = []
    made = trainer(
        tmp_path,
        reward_funcs=recording(calls),
        num_completions=num_completions,
        share_prompts=shared,
        generation_kwargs=extra,
        gradient_accumulation_steps=3,
    )
    micro_batches, _ = first_step(made)
    [scored] = calls
    by_prompt = {}
    for prompt, _, ids, _ in scored:
        by_prompt.setdefault(tuple(made.tokenizer(prompt)["input_ids"]), []).append(tuple(ids))
    assert len(by_prompt) == 12 and all(len(ids) == num_completions for ids in by_prompt.values())
    pairs = 0
    for rows in (rows for inputs in micro_batches for rows in inputs["passes"]):
        assert rows.tokens.shares_prompts is shared
        read = sequences(rows)
        for chosen, rejected in zip(rows.chosen_N.tolist(), rows.rejected_N.tolist(), strict=True):
            prompts, completions = zip(read[chosen], read[rejected], strict=True)
            assert prompts[0] == prompts[1]
            assert completions[0] in by_prompt[prompts[0]] and completions[1] in by_prompt[prompts[0]]
            score = {c: word_reward([made.tokenizer.decode(c, skip_special_tokens=True)])[0] for c in completions}
            assert score[completions[0]] > score[completions[1]]
            pairs += 1
    assert pairs >= 6


@pytest.mark.parametrize("extra", [None, {"no_repeat_ngram_size": 0}])
@pytest.mark.parametrize("num_completions", [2, 3, 5])
def test_each_completion_was_sampled_from_the_prompt_of_its_group(tmp_path, num_completions, extra):
    """The sampler's log-probabilities fit this prompt, and none of the others."""
    made = trainer(tmp_path, num_completions=num_completions, generation_kwargs=extra)
    prompts = prompts_from_batch(collate_prompts([made.train_dataset[i] for i in range(6)]))
    _, answer = made.collector.sample_and_assess(0, prompts)
    groups = answer().groups
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        for completion in group.completions:
            gaps = {}
            for prompt in prompts:
                ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
                with torch.no_grad():
                    logps = made.model(ids).logits.log_softmax(-1)[0, len(prompt.token_ids) - 1 : -1]
                picked = logps.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
                gaps[prompt.row] = (picked - torch.tensor(completion.logprobs)).abs().max().item()
            assert gaps.pop(group.prompt.row) < 1e-4 < min(gaps.values())


# invariants 6 and 12 --------------------------------------------------------------------------------------------------


def test_every_prompt_of_an_epoch_ends_as_a_pair_or_in_a_counted_reason(tmp_path):
    def moody(completions, name, **_):
        values = []
        for i, row in enumerate(name):
            kind = int(row.split()[1]) % 4
            values.append({0: float(i), 1: None, 2: float("nan") if i % 2 else 1.0, 3: 7.0}[kind])
        return values

    made = trainer(tmp_path, reward_funcs=moody, per_device_train_batch_size=5, max_steps=-1, num_train_epochs=2)
    made.train()
    totals = Counter()
    for log in made.state.log_history:
        totals.update({k: v for k, v in log.items() if k.startswith("dropped/") or k in ("pairs/count", "prompts")})
    assert totals["prompts"] == 24 and totals["pairs/count"] == 6
    assert totals["dropped/missing_score"] == 12 and totals["dropped/tie"] == 6
    assert totals["pairs/count"] + sum(v for k, v in totals.items() if k.startswith("dropped/")) == totals["prompts"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_prompt_ends_as_pairs_or_in_a_counted_reason_whatever_the_selection(tmp_path, strategy):
    made = trainer(
        tmp_path,
        num_completions=4,
        pair_selection=strategy,
        min_margin=1.5,
        max_margin=4.0,
        max_length_ratio=2.0,
        generation_kwargs={"eos_token_id": [1, 2, 5, 6, 7, 8]},  # completions of many lengths
        max_steps=-1,
        num_train_epochs=2,
    )
    made.train()
    totals = Counter()
    for log in made.state.log_history:
        totals.update({k: v for k, v in log.items() if k.startswith("dropped/") or k in ("pairs/groups", "prompts")})
    assert totals["prompts"] == 24 and totals["pairs/groups"] > 0
    assert totals["dropped/margin"] > 0 or totals["dropped/length_ratio"] > 0
    assert totals["pairs/groups"] + sum(v for k, v in totals.items() if k.startswith("dropped/")) == totals["prompts"]


def test_a_missing_score_does_not_beat_a_bad_one(tmp_path):
    """Incumbent behaviour: None becomes 0 and beats -1. Here no gradient flows from it at all."""
    made = trainer(tmp_path, reward_funcs=lambda completions, **_: [None, -1.0] * (len(completions) // 2))
    before = weights(made.model)
    with pytest.raises(NothingTrainedError, match="missing_score 4"):
        made.train()
    assert all(torch.equal(before[name], p) for name, p in made.model.named_parameters())
    assert made.state.log_history[0]["dropped/missing_score"] == 4


# invariant 7 ----------------------------------------------------------------------------------------------------------


def test_what_was_sampled_from_is_what_is_scored_and_trained_on(tmp_path):
    calls = []
    made = trainer(
        tmp_path, reward_funcs=recording(calls), train_dataset=dataset(lengths=(30, 31, 5, 32)), max_length=20
    )
    micro_batches, _ = first_step(made)
    assert {len(made.tokenizer(prompt)["input_ids"]) for prompt, *_ in calls[0]} == {12, 5}
    sampled_from = {tuple(made.tokenizer(prompt)["input_ids"]) for prompt, *_ in calls[0]}
    originals = [tuple(made.tokenizer(row["prompt"])["input_ids"]) for row in dataset(lengths=(30, 31, 5, 32))]
    assert sampled_from == {ids[-12:] for ids in originals}
    trained_on = {prompt for inputs in micro_batches for rows in inputs["passes"] for prompt, _ in sequences(rows)}
    assert trained_on and trained_on <= sampled_from


# randomness -----------------------------------------------------------------------------------------------------------


def test_epochs_and_steps_sample_different_completions(tmp_path):
    calls = []
    made = OnlineDPOTrainer(
        model=tiny.causal_lm(sharpness=1.0),
        reward_funcs=recording(calls),
        args=config(tmp_path, per_device_train_batch_size=12, max_steps=2, learning_rate=1e-12),
        train_dataset=dataset(),
        processing_class=tiny.tokenizer(),
    )
    made.train()
    first, second = ({name: ids for _, _, ids, name in call} for call in calls)
    assert first.keys() == second.keys() and sum(first[n] == second[n] for n in first) <= 2


def test_random_pairs_depend_on_seed_step_and_row_and_on_nothing_else(tmp_path):
    made = trainer(
        tmp_path, num_completions=6, pair_selection="best_random", reward_funcs=lambda completions, **_: [0.0]
    )
    groups = [tiny.group(p, [[5 + k, 1] for k in range(6)]) for p in tiny.prompts([3] * 40)]
    scores = Scores([[5.0, 0.0, 1.0, 2.0, 3.0, 4.0]] * 40, {})

    def rejected(groups, step):
        pairs = made.collector.form_pairs(groups, Scores(scores.values[: len(groups)], {}), step).pairs
        return {pair.group.prompt.row: pair.rejected for pair in pairs}

    first, second = rejected(groups, 0), rejected(groups, 1)
    assert set(first.values()) == {1, 2, 3, 4, 5} and first == rejected(groups[::-1], 0)
    assert rejected(groups[7:9], 0) == {row: first[row] for row in (7, 8)}
    assert sum(first[row] == second[row] for row in first) < 20
    made.args.seed = 43
    assert rejected(groups, 0) != first
