"""Rows and micro-batches as data: what stands where, nothing lost, nothing twice."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo.packing.microbatches import halve, passes_needed, split_pairs, token_count
from online_dpo.packing.pack import as_inputs, pack_groups, pack_pairs
from online_dpo.packing.prefix_tree import BLOCK, PADDING, Tree, lay_out, split_balanced, split_by_padded_size
from online_dpo.types import Pair
from support import tiny

tokens = st.integers(1, 99)
trees = st.lists(
    st.builds(
        Tree,
        prompt=st.lists(tokens, min_size=1, max_size=12).map(tuple),
        branches=st.lists(st.lists(tokens, min_size=1, max_size=9).map(tuple), min_size=1, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=9,
)


def make_pairs(lengths):
    """One pair for each (prompt, chosen, rejected) length."""
    prompts = tiny.prompts([prompt for prompt, _, _ in lengths])
    groups = [tiny.group(p, [[9] * c, [8] * r]) for p, (_, c, r) in zip(prompts, lengths, strict=True)]
    return [Pair(group, 0, 1, 1.0, 0.0) for group in groups]


lengths = st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30))
pair_lists = st.lists(lengths, max_size=20).map(make_pairs)


def test_values_of_shared_rows():
    rows, places = lay_out([Tree((7, 8), ((1, 2), (3,))), Tree((9,), ((4,),))], shared=True, capacity=8)
    rest = BLOCK - 7
    assert rows.ids_RT.tolist() == [[7, 8, 1, 2, 3, 9, 4, *[0] * rest]]
    assert rows.positions_RT.tolist() == [[0, 1, 2, 3, 2, 0, 1, *[0] * rest]]
    assert rows.tree_RT.tolist() == [[0, 0, 0, 0, 0, 1, 1, *[PADDING] * rest]]
    assert rows.branch_RT.tolist() == [[0, 0, 1, 1, 2, 0, 1, *[0] * rest]]
    assert [[(p.before, p.start) for p in tree] for tree in places] == [[(1, 2), (1, 4)], [(5, 6)]]


def test_values_of_rows_of_one_branch():
    rows, places = lay_out([Tree((7, 8), ((1, 2), (3,)))], shared=False)
    assert rows.ids_RT.tolist() == [[7, 8, 1, 2], [7, 8, 3, 0]]
    assert rows.positions_RT.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert rows.tree_RT.tolist() == [[0, 0, 0, 0], [1, 1, 1, PADDING]]
    assert [(p.before, p.start) for p in places[0]] == [(1, 2), (5, 6)]


@given(trees, st.booleans(), st.integers(0, 80))
@settings(max_examples=150, deadline=None)
def test_every_branch_can_be_read_back(made, shared, capacity):
    rows, places = lay_out(made, shared, capacity)
    ids, positions = rows.ids_RT.flatten().tolist(), rows.positions_RT.flatten().tolist()
    tree, branch = rows.tree_RT.flatten().tolist(), rows.branch_RT.flatten().tolist()
    for t, row in zip(made, places, strict=True):
        for tokens_of_branch, place in zip(t.branches, row, strict=True):
            end = place.start + len(tokens_of_branch)
            assert tuple(ids[place.start : end]) == tokens_of_branch
            assert positions[place.start : end] == list(range(len(t.prompt), len(t.prompt) + len(tokens_of_branch)))
            first = place.before - len(t.prompt) + 1
            assert tuple(ids[first : place.before + 1]) == t.prompt
            assert positions[first : place.before + 1] == list(range(len(t.prompt)))
            assert len(set(tree[first : place.before + 1] + tree[place.start : end])) == 1
            assert len(set(branch[place.start : end])) == 1 and set(branch[first : place.before + 1]) == {0}
            assert first // rows.ids_RT.shape[1] == (end - 1) // rows.ids_RT.shape[1]
    real = sum(t != PADDING for t in tree)
    if shared:
        assert real == sum(t.size for t in made)
        length = rows.ids_RT.shape[1]
        assert length % BLOCK == 0 if capacity else length == max(t.size for t in made)
        # First fit: no two rows are half empty at the same time.
        filled = sorted((rows.tree_RT != PADDING).sum(dim=1).tolist())
        assert len(filled) < 2 or filled[0] + filled[1] > max(capacity, *(t.size for t in made))
    else:
        assert real == sum(len(t.prompt) + len(b) for t in made for b in t.branches)


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_balanced_lists_keep_everything_and_differ_by_at_most_the_largest(sizes, parts):
    lists = split_balanced(sizes, parts)
    assert sorted(i for part in lists for i in part) == list(range(len(sizes))) and len(lists) == parts
    loads = [sum(sizes[i] for i in part) for part in lists]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@given(pair_lists, st.integers(1, 150))
@settings(max_examples=100, deadline=None)
def test_passes_stay_within_the_budget(pairs, budget):
    count = passes_needed(pairs, budget)
    pieces = split_pairs(pairs, count)
    assert sorted(id(p) for piece in pieces for p in piece) == sorted(map(id, pairs))
    assert all(len(piece) <= 1 or token_count(piece) <= budget for piece in pieces)
    assert 1 <= count <= max(1, len(pairs))
    if count > 1 and all(token_count([pair]) <= budget for pair in pairs):
        fewer = split_pairs(pairs, count - 1)
        assert any(len(piece) > 1 and token_count(piece) > budget for piece in fewer)


@given(pair_lists.filter(lambda pairs: len(pairs) >= 2), st.booleans())
@settings(max_examples=50, deadline=None)
def test_halves_hold_the_same_pairs(pairs, shared):
    halves = halve(pack_pairs(pairs, shared))
    assert sorted(id(p) for half in halves for p in half.pairs) == sorted(map(id, pairs))
    assert len(halves) == 2 and all(half.pairs for half in halves)
    assert all(half.tokens.shares_prompts is shared for half in halves)


@pytest.mark.smoke
@pytest.mark.parametrize("shared", [False, True])
def test_groups_and_pairs_point_at_the_same_completions(shared):
    groups = [tiny.group(p, [[4, 5], [6], [7, 8, 9]]) for p in tiny.prompts([3, 5])]
    pairs = [Pair(groups[1], 2, 0), Pair(groups[0], 1, 2)]
    rows = pack_groups(groups, pairs, shared)
    completions = [tuple(ids.tolist()) for ids in rows.target_M.split(rows.length_S.tolist())]
    assert completions == [c.token_ids for g in groups for c in g.completions]
    for n, pair in enumerate(pairs):
        assert completions[rows.chosen_N[n]] == pair.chosen_completion.token_ids
        assert completions[rows.rejected_N[n]] == pair.rejected_completion.token_ids
    assert [rows.chosen_N.tolist(), rows.rejected_N.tolist()] == [[5, 1], [3, 2]]
    # what predicts the first token of a completion is the last of its prompt
    firsts = rows.source_M[[0, 2, 3, 6, 8, 9]]
    assert rows.tokens.ids_RT.flatten()[firsts].tolist() == [g.prompt.token_ids[-1] for g in groups for _ in range(3)]


def test_a_pair_of_many_completions_takes_only_its_two():
    group = tiny.group(tiny.prompts([4])[0], [[4], [5, 5], [6, 6, 6], [7]])
    rows = pack_pairs([Pair(group, 2, 1, 3.0, None)], shared=True)
    assert rows.tokens.ids_RT.tolist() == [[*group.prompt.token_ids, 6, 6, 6, 5, 5]]
    assert rows.chosen_N.tolist() == [0] and rows.rejected_N.tolist() == [1] and rows.weight_N.tolist() == [1.0]
    assert rows.score_S[0] == 3.0 and rows.score_S[1].isnan()


def all_pairs_of(lengths):
    """Every pair of a group with completions of these lengths."""
    group = tiny.group(tiny.prompts([4])[0], [[5 + k] * length for k, length in enumerate(lengths)])
    count = range(len(lengths))
    return [Pair(group, i, j, float(-i), float(-j)) for i in count for j in count if i < j]


@pytest.mark.parametrize("shared", [False, True])
def test_pairs_of_one_group_share_their_completions_and_one_prompt(shared):
    pairs = [*make_pairs([(3, 2, 5)]), *all_pairs_of([1, 2, 3]), *make_pairs([(4, 1, 1)])]
    rows = pack_pairs(pairs, shared)
    assert token_count(pairs) == (3 + 2 + 5) + (4 + 1 + 2 + 3) + (4 + 1 + 1)
    assert len(rows.length_S) == 2 + 3 + 2 and len(rows.chosen_N) == 5
    completions = [tuple(ids.tolist()) for ids in rows.target_M.split(rows.length_S.tolist())]
    for pair, chosen, rejected in zip(pairs, rows.chosen_N.tolist(), rows.rejected_N.tolist(), strict=True):
        assert completions[chosen] == pair.chosen_completion.token_ids
        assert completions[rejected] == pair.rejected_completion.token_ids
        assert rows.score_S[[chosen, rejected]].tolist() == [pair.chosen_score, pair.rejected_score]
    if shared:
        assert int((rows.tokens.tree_RT >= 0).sum()) == token_count(pairs)


def test_groups_stay_whole_until_one_alone_is_too_large():
    pairs = [*all_pairs_of([10, 10, 10]), *make_pairs([(3, 5, 5)]), *all_pairs_of([2, 2, 2, 2])]
    assert passes_needed(pairs, 1) == 3 and passes_needed(pairs, 50) == 2 and passes_needed(pairs, 59) == 1
    for parts in (1, 2, 3, 5):
        pieces = split_pairs(pairs, parts)
        places = {(id(pair.group), n) for n, piece in enumerate(pieces) for pair in piece}
        assert len(places) == 3 and sum(map(len, pieces)) == len(pairs)
    halves = halve(pack_pairs(all_pairs_of([10, 10, 10]), shared=True))
    assert [len(half.pairs) for half in halves] == [2, 1]


def test_probabilities_and_weights_of_pairs():
    [pair] = make_pairs([(3, 2, 5)])
    rows = pack_pairs([pair, replace(pair, probability=0.75, weight=2.5)], shared=True)
    assert rows.probability_N.tolist() == [1.0, 0.75] and rows.weight_N.tolist() == [1.0, 2.5]


def test_trainer_counts_real_tokens():
    passes = [pack_pairs(make_pairs([(3, 2, 5), (4, 1, 1)]), shared) for shared in (True, False)]
    inputs = as_inputs(passes)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (1, 16 + 23)
    assert inputs["attention_mask"].all()


@pytest.mark.parametrize("longest_first", [False, True])
def test_neighbours_are_cut_where_their_padded_rows_take_more(longest_first):
    sizes = [4, 30, 3, 4, 5, 1]
    order = sorted(range(6), key=lambda i: sizes[i], reverse=longest_first)
    expected = [[1], [4, 0], [3, 2, 5]] if longest_first else [[5, 2, 0], [3, 4], [1]]
    assert list(split_by_padded_size(order, sizes, budget=12)) == expected
    assert list(split_by_padded_size([], sizes, budget=12)) == []
