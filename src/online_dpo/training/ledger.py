"""`Ledger`: what the stages said of each group of the step that is trained on, joined once it has been."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from online_dpo.rollout.token_texts import TokenTexts
from online_dpo.runs.choice import chosen_places, share_of_rank
from online_dpo.runs.records import GroupRecord
from online_dpo.training.group_records import StepTrained, group_records
from online_dpo.training.objective_step import PairLosses
from online_dpo.training.trained_pairs import TrainedPairs
from online_dpo.types import Feedback, PackedRows


@dataclass(frozen=True)
class Place:
    """A rank among so many.

    >>> Place(rank=0, ranks=2)
    """

    rank: int
    ranks: int

    @classmethod
    def of(cls, accelerator: Accelerator) -> Place:
        """The place of this process."""
        return cls(accelerator.process_index, accelerator.num_processes)


class Ledger:
    """Keeps the facts of the step that is trained on, and gives a record of each of its groups.

    Off (as it is at first), nothing is kept. What is computed is the same, on or off; a pass costs one copy of its
    log-probabilities, which nothing waits for.

    Args:
        tokenizer: the policy's, for the texts of tokens.
        place: the rank whose groups these are.
        seed: of the choice of groups, where only some are recorded.
        skipped: whether the update of the present step was left out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, place: Place, seed: int, skipped: Callable[[], bool] = lambda: False
    ) -> None:
        self.on = False
        self._tokenizer, self._place, self._seed, self._skipped = tokenizer, place, seed, skipped
        self._texts: TokenTexts | None = None
        self._feedback: Feedback | None = None
        self._pairs = TrainedPairs()
        self._taken: tuple[int, list[GroupRecord]] = (-1, [])

    def begin_step(self, feedback: Feedback | None) -> None:
        """Begins a step: from its feedback its pairs are trained on next."""
        self._feedback = feedback if self.on else None
        self._taken = (-1, [])  # a further run of the same trainer has a step of this number as well
        self._pairs.begin_step()

    def saw_pass(self, rows: PackedRows, losses: PairLosses) -> None:
        """Keeps what a forward pass of training said of the pairs in these rows."""
        if self._feedback is not None:
            self._pairs.saw_pass(rows, losses)

    def take(self, step: int, most: int | None = None) -> list[GroupRecord]:
        """Returns the records of the step that has been trained on, and forgets it; none if the ledger was off.

        Args:
            step: the number of the step: how many have been done, this one included.
            most: the number of groups to record over all ranks; all if not given.
        """
        feedback, self._feedback = self._feedback, None
        if feedback is None:
            return []
        of = StepTrained(step, self._place.rank, feedback, self._pairs.read(), self._skipped())
        self._pairs.begin_step()
        records = group_records(of, self._pieces, None if most is None else self._chosen(feedback, step, most))
        self._taken = step, records
        return records

    def of_step(self, step: int, most: int | None = None) -> list[GroupRecord]:
        """Returns the records of the step that has been trained on: those that `take` has returned for it, if it has
        been called, else as it does. So several may read them.
        """
        return self._taken[1] if self._taken[0] == step else self.take(step, most)

    def _chosen(self, feedback: Feedback, step: int, most: int) -> set[int]:
        share = share_of_rank(most, step, self._place.rank, self._place.ranks)
        return set(chosen_places([group.prompt.row for group in feedback.groups], share, self._seed, step))

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        if self._texts is None:
            self._texts = TokenTexts(self._tokenizer)
        return self._texts.pieces(ids)
