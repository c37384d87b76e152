"""The trainer's datasets: prompts that are checked, converted and tokenised before a model is loaded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.cut import CutPromptsCallback
from online_dpo.data.prompts import PREPARED_COLUMNS, prepare_prompts
from online_dpo.data.stream import EndlessStream
from online_dpo.distributed.collectives import RankErrors
from online_dpo.errors import ForeignCodeError
from online_dpo.foreign import foreign
from online_dpo.scoring.rewards.function import BUILT_IN_ARGUMENTS
from online_dpo.training.arguments import check_batches, check_columns, check_stream, named_datasets

logger = logging.getLogger(__name__)


class DatasetPreparer:
    """Prepares the datasets of a run, each once.

    ``dropped`` counts the rows that were left out, by reason; ``callbacks`` are those that a stream needs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> None:
        self._tokenizer, self._args = tokenizer, args
        self.dropped: Counter[str] = Counter()
        self.callbacks: list[TrainerCallback] = []

    def prepare(self, dataset: Any, name: str) -> Any:
        """Returns the dataset with prepared prompts; one that is prepared already as it is.

        Args:
            name: what errors call it.

        Raises:
            InvalidPromptError: a row is no usable prompt, and ``invalid_prompts`` is "error".
        """
        columns = getattr(dataset, "column_names", None) or []
        if set(PREPARED_COLUMNS) <= set(columns) or isinstance(dataset, EndlessStream):
            return dataset
        with self._args.main_process_first(desc=f"preparing {name}"):
            dataset, dropped = prepare_prompts(dataset, self._tokenizer, self._args, name=name)
        self.dropped += dropped
        taken = [column for column in dataset.column_names or () if column in BUILT_IN_ARGUMENTS]
        if taken and self._args.process_index == 0:
            logger.warning(
                "%s: the columns %s do not reach reward functions, which get arguments of these names from the "
                "trainer. Rename them.",
                name,
                ", ".join(taken),
            )
        return dataset

    def prepare_training(self, dataset: Any) -> Any:
        """Returns the prepared dataset to train on; a stream becomes one without an end.

        Raises:
            ValueError: the dataset does not fill a batch, or the configuration needs epochs and a stream has none.
        """
        dataset = self.prepare(dataset, "train_dataset")
        if isinstance(dataset, IterableDataset):
            check_stream(self._args)
            self.callbacks.append(CutPromptsCallback("train_dataset"))
            dataset = EndlessStream(dataset)
        check_batches(dataset, self._args)
        return dataset

    def prepare_evaluation(self, dataset: Any) -> Any:
        """Returns the prepared dataset to evaluate on, or each of several by name."""
        if isinstance(dataset, dict):
            return {name: self.prepare(data, f"eval_dataset[{name!r}]") for name, data in dataset.items()}
        return None if dataset is None else self.prepare(dataset, "eval_dataset")


def check_reward_functions(
    reward_funcs: Any, eval_reward_funcs: Any, train_dataset: Any, eval_dataset: Any, args: OnlineDPOConfig
) -> None:
    """Checks that reward functions find the columns that they name in the datasets that they will see.

    Raises:
        ScoringError: a column is missing.
    """
    evaluated = named_datasets(eval_dataset) if args.eval_strategy != "no" else {}
    check_columns(reward_funcs, {"train_dataset": train_dataset, **evaluated}, PREPARED_COLUMNS)
    check_columns(eval_reward_funcs, evaluated, PREPARED_COLUMNS)


def next_batch(batches: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the next batch of prompts to evaluate on; ``None`` after the last.

    Raises:
        ForeignCodeError: the user's dataset or collator failed.
    """
    with foreign("Reading the prompts to evaluate on", raises=ForeignCodeError):
        return next(batches, None)


def next_batch_of_all(batches: Iterator[dict[str, Any]], errors: RankErrors) -> dict[str, Any] | None:
    """As `next_batch`, a collective operation: all ranks have a batch, or none has.

    Raises:
        ForeignCodeError: that failed on a rank, or only some of them have a batch.
    """
    batch = errors.run(lambda: next_batch(batches))
    errors.check_same({"a further batch": batch is not None}, "number of prompts to evaluate on")
    return batch
