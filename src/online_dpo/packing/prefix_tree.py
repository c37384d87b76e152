"""Token sequences that share their beginnings, laid out in rows. Pure: lists in, tensors out.

Shapes: ``R`` rows, ``T`` tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from online_dpo.types import TokenRows

PADDING = -1
BLOCK = 128  # what FlexAttention works in; multiples of it make few lengths to compile for


@dataclass(frozen=True)
class Tree:
    """A prompt of one token or more, and the completions that go on from it.

    >>> Tree(prompt=(5, 81, 7), branches=((9, 4, 2), (9, 2)))
    """

    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Tokens when the prompt is stored once."""
        return len(self.prompt) + sum(len(branch) for branch in self.branches)


@dataclass(frozen=True)
class Span:
    """Where a branch stands: index of the last prompt token and of the branch's first, in the flattened rows."""

    before: int
    start: int


def lay_out(trees: Sequence[Tree], shared: bool, capacity: int = 0) -> tuple[TokenRows, list[list[Span]]]:
    """Rows of the trees, and the place of every branch of every tree.

    Args:
        shared: one copy of each prompt, and as many trees in a row as fit. Otherwise one row a branch.
        capacity: fill rows up to this many tokens, and to a multiple of `BLOCK`. By default, up to those of the
            largest tree.
    """
    if not shared:
        return _one_branch_a_row(trees)
    rows = _fill_rows([tree.size for tree in trees], max(capacity, *(tree.size for tree in trees)))
    longest = max(sum(trees[i].size for i in row) for row in rows)
    length = math.ceil(longest / BLOCK) * BLOCK if capacity else longest
    grid = _Grid(len(rows), length)
    places: list[list[Span]] = [[] for _ in trees]
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            before = at + len(trees[i].prompt) - 1
            at = grid.write(r, at, trees[i].prompt, position=0, tree=i, branch=0)
            for b, branch in enumerate(trees[i].branches, start=1):
                places[i].append(Span(r * length + before, r * length + at))
                at = grid.write(r, at, branch, position=len(trees[i].prompt), tree=i, branch=b)
    return grid.rows(shares_prompts=True), places


def split_balanced(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of ``sizes`` in ``parts`` lists with about equal sums, in ascending order; some may be empty.

    Longest first, each to the lightest list so far: no list is heavier than another by more than the largest size
    (Graham 1969, "Bounds on multiprocessing timing anomalies").
    """
    lists: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        lightest = loads.index(min(loads))
        lists[lightest].append(i)
        loads[lightest] += sizes[i]
    return [sorted(indices) for indices in lists]


def split_by_padded_size(order: Sequence[int], sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Neighbours in ``order``, which goes from short to long or from long to short, that take at most ``budget`` when
    all are padded to the longest of them; or a single one that takes more.

    >>> list(split_by_padded_size([2, 0, 1], sizes=[3, 3, 9], budget=10))
    [[2], [0, 1]]
    """
    piece: list[int] = []
    for i in order:
        if piece and (len(piece) + 1) * max(sizes[piece[0]], sizes[i]) > budget:
            yield piece
            piece = []
        piece.append(i)
    if piece:
        yield piece


def _fill_rows(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``sizes`` in few rows of at most ``capacity``: longest first, each into the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, left in enumerate(room) if left >= sizes[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= sizes[i]
    return rows


def _one_branch_a_row(trees: Sequence[Tree]) -> tuple[TokenRows, list[list[Span]]]:
    count = sum(len(tree.branches) for tree in trees)
    length = max(len(tree.prompt) + len(branch) for tree in trees for branch in tree.branches)
    grid = _Grid(count, length)
    places: list[list[Span]] = [[] for _ in trees]
    r = 0
    for i, tree in enumerate(trees):
        for branch in tree.branches:
            start = r * length + len(tree.prompt)
            places[i].append(Span(start - 1, start))
            grid.write(r, 0, (*tree.prompt, *branch), position=0, tree=r, branch=0)
            r += 1
    return grid.rows(shares_prompts=False), places


class _Grid:
    """Rows being written: everything is padding at first, token 0 that nothing looks at."""

    def __init__(self, rows: int, length: int) -> None:
        self._ids = [[0] * length for _ in range(rows)]
        self._positions = [[0] * length for _ in range(rows)]
        self._trees = [[PADDING] * length for _ in range(rows)]
        self._branches = [[0] * length for _ in range(rows)]

    def write(self, row: int, at: int, ids: Sequence[int], position: int, tree: int, branch: int) -> int:
        """The tokens from place ``at`` on; returns the place after them."""
        end = at + len(ids)
        self._ids[row][at:end] = ids
        self._positions[row][at:end] = range(position, position + len(ids))
        self._trees[row][at:end] = [tree] * len(ids)
        self._branches[row][at:end] = [branch] * len(ids)
        return end

    def rows(self, shares_prompts: bool) -> TokenRows:
        return TokenRows(
            ids_RT=torch.tensor(self._ids),
            positions_RT=torch.tensor(self._positions),
            tree_RT=torch.tensor(self._trees),
            branch_RT=torch.tensor(self._branches),
            shares_prompts=shares_prompts,
        )
