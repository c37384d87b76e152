"""A batch of sequences that are decoded together: their random numbers, tokens and ends.

Shapes: ``P`` prompts, ``K`` completions, ``B = P * K`` sequences, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StopStringCriteria

from online_dpo.rollout.builtin.random_numbers import uniform_numbers
from online_dpo.rollout.completion_text import completion_texts
from online_dpo.rollout.params import RolloutKey, SamplingParams
from online_dpo.types import Completion, Group, Prompt

COMPACT_BELOW = 0.75
"""Finished sequences are dropped when this share of the rows of a step, or less, would remain: dropping copies the
cache.
"""


class Batch:
    """The sequences that are decoded together, and the tokens that have been sampled so far.

    Sequence ``p * K + k`` is completion k of prompt p, also after the decoder has dropped others.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        num_completions: int,
        params: SamplingParams,
        key: RolloutKey,
        device: torch.device,
    ) -> None:
        self.prompts, self.num_completions, self.params, self.key = prompts, num_completions, params, key
        self.pad_token_id = 0  # any id will do: padding is masked out
        size, steps = len(prompts) * num_completions, params.max_new_tokens
        uniform = [
            uniform_numbers(key, prompt.row, sample, steps)
            for prompt in prompts
            for sample in key.samples(num_completions)
        ]
        self.uniform_BT = torch.stack([torch.from_numpy(numbers) for numbers in uniform]).to(device)
        self.ids_BT = torch.full((size, steps), self.pad_token_id, dtype=torch.long, device=device)
        self.logprobs_BT = torch.zeros((size, steps), device=device)
        self.length_B = torch.full((size,), steps, dtype=torch.long, device=device)
        self.stopped_B = torch.zeros(size, dtype=torch.bool, device=device)
        self._end_ids = torch.tensor(params.end_token_ids, dtype=torch.long, device=device)
        self._seen_BV: torch.Tensor | None = None
        self._true = torch.ones((), dtype=torch.bool, device=device)

    def note_prompt_tokens(self, vocabulary: int) -> None:
        """Notes, before the first draw, which tokens occur in the prompts. Only a repetition penalty needs this."""
        if self.params.repetition_penalty == 1.0 or self._seen_BV is not None:
            return
        seen_PV = torch.zeros(len(self.prompts), vocabulary, dtype=torch.bool, device=self.ids_BT.device)
        for p, prompt in enumerate(self.prompts):
            seen_PV[p, list(prompt.token_ids)] = True
        self._seen_BV = seen_PV.repeat_interleave(self.num_completions, dim=0)

    def draw_arguments(
        self, step: int, rows_B: torch.Tensor
    ) -> tuple[torch.Tensor, SamplingParams, torch.Tensor | None]:
        """The last three arguments of `next_tokens` (``uniform_B``, ``params``, ``seen_BV``) for these rows."""
        return self.uniform_BT[rows_B, step], self.params, None if self._seen_BV is None else self._seen_BV[rows_B]

    def write(self, step: int, rows_B: torch.Tensor, token_B: torch.Tensor, logps_B: torch.Tensor) -> None:
        """Writes the next token of each of ``rows_B``, and padding where the completion has ended before."""
        stopped_B = self.stopped_B[rows_B]
        self.ids_BT[rows_B, step] = token_B.masked_fill(stopped_B, self.pad_token_id)
        self.logprobs_BT[rows_B, step] = logps_B.masked_fill(stopped_B, 0.0)
        if self._seen_BV is not None:
            self._seen_BV.index_put_((rows_B, token_B), self._true)

    def mark_finished(
        self, step: int, rows_B: torch.Tensor, token_B: torch.Tensor, stop_strings: StopStringCriteria | None
    ) -> torch.Tensor:
        """Marks the sequences that end with this token; returns which of ``rows_B`` have ended by now, (B,) bool."""
        ended_B = (token_B[:, None] == self._end_ids).any(dim=1)
        if stop_strings is not None:
            ended_B |= stop_strings(self.ids_BT[rows_B, : step + 1], None)  # pyright: ignore[reportArgumentType, reportOperatorIssue]
        before_B = self.stopped_B[rows_B]
        self.length_B[rows_B] = self.length_B[rows_B].masked_fill(ended_B & ~before_B, step + 1)
        self.stopped_B[rows_B] = before_B | ended_B
        return before_B | ended_B

    def groups(self, tokenizer: PreTrainedTokenizerBase, version: int) -> list[Group]:
        """The groups, one for each prompt, with texts decoded by ``tokenizer`` and this policy version."""
        lengths, stopped = self.length_B.tolist(), self.stopped_B.tolist()
        ids = [row[:n] for row, n in zip(self.ids_BT.tolist(), lengths, strict=True)]
        logprobs = [row[:n] for row, n in zip(self.logprobs_BT.tolist(), lengths, strict=True)]
        texts = completion_texts(tokenizer, self.prompts, ids)
        completions = [
            Completion(
                token_ids=tuple(ids[b]),
                logprobs=tuple(logprobs[b]),
                finish_reason="stop" if stopped[b] else "length",
                policy_version=version,
                text=texts[b],
            )
            for b in range(len(ids))
        ]
        k = self.num_completions
        return [Group(prompt, tuple(completions[p * k : (p + 1) * k])) for p, prompt in enumerate(self.prompts)]


def rows_to_keep(running_GK: torch.Tensor, rows: Callable[[int, int], int]) -> torch.Tensor | None:
    """The sequences to go on with, as indices, (G', K'); ``None`` if dropping the others saves too little.

    Groups without a running sequence are dropped. The others keep the same number of sequences each, since a step is
    computed as groups times completions; so a finished sequence may stay.

    Args:
        running_GK: which sequences have not ended, bool.
        rows: how many sequences a step computes for a number of groups and of completions of each.
    """
    counts_G = running_GK.sum(dim=1)
    k, groups = running_GK.shape[1], (counts_G > 0).nonzero()
    if rows(len(groups), int(counts_G.max())) > COMPACT_BELOW * rows(*running_GK.shape):
        return None
    order_GK = running_GK.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts_G.max())]
    return groups * k + order_GK[groups[:, 0]]


def left_padded(
    sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of sequences that are padded on the left, (B, T) each."""
    length = max(len(ids) for ids in sequences)
    ids = [[pad_token_id] * (length - len(s)) + list(s) for s in sequences]
    mask = [[0] * (length - len(s)) + [1] * len(s) for s in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
