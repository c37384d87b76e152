"""The layout of token sequences that share a prefix, in the rows of a batch. Pure: lists in, tensors out.

Shapes: ``R`` rows, ``T`` tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from online_dpo.types import TokenRows

PADDING = -1
BLOCK = 128  # FlexAttention's block size; with its multiples, few row lengths occur for which it is compiled


@dataclass(frozen=True)
class Tree:
    """A prompt of one token or more, and the completions that continue it.

    >>> Tree(prompt=(5, 81, 7), branches=((9, 4, 2), (9, 2)))
    """

    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """The number of tokens if the prompt is stored once."""
        return len(self.prompt) + sum(len(branch) for branch in self.branches)


@dataclass(frozen=True)
class Span:
    """The position of a branch in the flattened rows: the indices of its prompt's last token (``before``) and of its
    own first token (``start``).
    """

    before: int
    start: int


def lay_out(trees: Sequence[Tree], shared: bool, capacity: int = 0) -> tuple[TokenRows, list[list[Span]]]:
    """Lays trees out in rows; returns the rows, and the span of every branch of every tree.

    Args:
        shared: store each prompt once, and as many trees in a row as fit. Otherwise each branch has its own row, with
            its prompt.
        capacity: the number of tokens up to which a row is filled; rows are then padded to a multiple of `BLOCK`. By
            default, rows are as long as the largest tree.
    """
    if not shared:
        return _one_branch_a_row(trees)
    rows = _fill_rows([tree.size for tree in trees], max(capacity, *(tree.size for tree in trees)))
    longest = max(sum(trees[i].size for i in row) for row in rows)
    length = math.ceil(longest / BLOCK) * BLOCK if capacity else longest
    grid = _Grid(len(rows), length)
    spans: list[list[Span]] = [[] for _ in trees]
    for r, row in enumerate(rows):
        column = 0
        for i in row:
            before = column + len(trees[i].prompt) - 1
            column = grid.write(r, column, trees[i].prompt, position=0, tree=i, branch=0)
            for b, branch in enumerate(trees[i].branches, start=1):
                spans[i].append(Span(r * length + before, r * length + column))
                # Positions restart behind the prompt in each branch, as if it were alone.
                column = grid.write(r, column, branch, position=len(trees[i].prompt), tree=i, branch=b)
    return grid.rows(shares_prompts=True), spans


def split_balanced(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Distributes the indices of ``sizes`` over ``parts`` lists with about equal sums. Lists are sorted and may be
    empty.

    The largest remaining size goes to the list with the smallest sum so far (LPT). So no two sums differ by more than
    the largest size (Graham 1969, "Bounds on multiprocessing timing anomalies").
    """
    lists: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        lightest = loads.index(min(loads))
        lists[lightest].append(i)
        loads[lightest] += sizes[i]
    return [sorted(indices) for indices in lists]


def split_by_padded_size(order: Sequence[int], sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Splits ``order`` into batches of neighbours, each of at most ``budget`` tokens after padding, or a single index.

    Args:
        order: indices of ``sizes``, sorted by size, up or down.
        sizes: number of tokens of each sequence.
        budget: the largest number of tokens of a batch whose sequences are padded to the longest of them.

    >>> list(split_by_padded_size([2, 0, 1], sizes=[3, 3, 9], budget=10))
    [[2], [0, 1]]
    """
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * max(sizes[batch[0]], sizes[i]) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _fill_rows(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Distributes the indices of ``sizes`` over few rows of at most ``capacity`` (first-fit decreasing)."""
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
    """Lays each branch out in its own row, behind a copy of its prompt, padded on the right."""
    count = sum(len(tree.branches) for tree in trees)
    length = max(len(tree.prompt) + len(branch) for tree in trees for branch in tree.branches)
    grid = _Grid(count, length)
    spans: list[list[Span]] = [[] for _ in trees]
    r = 0
    for i, tree in enumerate(trees):
        for branch in tree.branches:
            start = r * length + len(tree.prompt)
            spans[i].append(Span(start - 1, start))
            grid.write(r, 0, (*tree.prompt, *branch), position=0, tree=r, branch=0)
            r += 1
    return grid.rows(shares_prompts=False), spans


class _Grid:
    """A grid of rows to be filled. At first all is padding: token id 0, to which no other token attends."""

    def __init__(self, rows: int, length: int) -> None:
        self._ids = [[0] * length for _ in range(rows)]
        self._positions = [[0] * length for _ in range(rows)]
        self._trees = [[PADDING] * length for _ in range(rows)]
        self._branches = [[0] * length for _ in range(rows)]

    def write(self, row: int, column: int, ids: Sequence[int], position: int, tree: int, branch: int) -> int:
        """Writes tokens into a row from ``column`` on, with positions from ``position`` on; returns the next column."""
        end = column + len(ids)
        self._ids[row][column:end] = ids
        self._positions[row][column:end] = range(position, position + len(ids))
        self._trees[row][column:end] = [tree] * len(ids)
        self._branches[row][column:end] = [branch] * len(ids)
        return end

    def rows(self, shares_prompts: bool) -> TokenRows:
        """The rows as tensors."""
        return TokenRows(
            ids_RT=torch.tensor(self._ids),
            positions_RT=torch.tensor(self._positions),
            tree_RT=torch.tensor(self._trees),
            branch_RT=torch.tensor(self._branches),
            shares_prompts=shares_prompts,
        )
