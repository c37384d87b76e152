"""Prepares a dataset: prompts are found, checked, converted, tokenised and truncated once.

Map-style and streaming datasets use the same row function, :class:`PromptRow`.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from online_dpo.config.json_text import parse_json
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.chat import settled_messages
from online_dpo.data.convert import PromptSource, find_source, without_nulls
from online_dpo.data.cut import cut_message
from online_dpo.data.json_columns import dataset_from_rows, json_columns_of, reading_json
from online_dpo.data.template_arguments import check_arguments, row_arguments
from online_dpo.data.text import UnusablePrompt
from online_dpo.data.tokens import fit_messages, fit_text
from online_dpo.distributed.process_state import kept_environment
from online_dpo.errors import InvalidPromptError
from online_dpo.types import Message

logger = logging.getLogger(__name__)

ADDED_COLUMNS = ("prompt_ids", "prompt_row", "prompt_invalid", "prompt_cut")
PREPARED_COLUMNS = ("prompt", *ADDED_COLUMNS)
_PROBED_STREAM_ROWS = 100

PromptKind = Literal["text", "messages"]


def prepare_prompts(
    dataset: Dataset | IterableDataset | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    args: OnlineDPOConfig,
    *,
    name: str = "train_dataset",
) -> tuple[Dataset | IterableDataset, Counter[str]]:
    """Find, check, convert and tokenise the prompt of every row.

    The prompt is ``args.prompt_template`` over columns, else ``args.prompt_column``, else the column ``prompt``,
    ``messages`` or ``chosen`` (see :mod:`online_dpo.data.convert` for the conversions). HH transcripts become messages
    if the tokenizer has a chat template, else they stay text in their own format.

    Args:
        dataset: a map-style dataset, a stream, or a list of dicts.
        tokenizer: the policy's tokenizer.
        args: the fields ``prompt_*``, ``chat_template_kwargs``, ``invalid_prompts``, ``truncate_prompts``,
            ``prompt_limit`` and ``dataset_num_proc`` are used.
        name: name of the dataset in messages.

    Returns:
        The dataset and the number of rows that were left out, by reason. The dataset has all its columns, and
        ``prompt`` (text or messages, truncated like its tokens), ``prompt_ids`` (at most ``args.prompt_limit`` token
        ids), ``prompt_row`` (index in the source dataset; for a stream, the order of reading, which each worker of a
        data loader counts separately), ``prompt_invalid`` (a reason or ``None``) and ``prompt_cut`` (whether it was
        truncated). With ``invalid_prompts="filter"``, a map-style dataset loses its invalid rows; a stream keeps them,
        with the reason and without ``prompt_ids``, and its counter is empty.

    Raises:
        TypeError: the dataset is of another type.
        ValueError: the dataset is empty, has no prompt column, already has one of the columns above, holds messages
            although the tokenizer has no chat template, or has no usable row.
        InvalidPromptError: a row is unusable and ``args.invalid_prompts`` is "error"; for a stream, when it is read.
    """
    rows = _as_dataset(dataset, name)
    source, kind = _settle_kind(rows, _checked_source(rows, tokenizer, args, name), tokenizer, args, name)
    keeps_json = kind == "messages" and (source.column in json_columns_of(rows) or _holds_parts(rows, source))
    prepare_row = PromptRow(
        tokenizer=tokenizer,
        source=source,
        kind=kind,
        limit=args.prompt_limit,
        truncate=args.truncate_prompts,
        raise_invalid=args.invalid_prompts == "error",
        name=name,
        chat_template_kwargs=_template_kwargs(args),
        prompt_as_json=keeps_json,
    )
    if isinstance(rows, IterableDataset):
        return rows.map(prepare_row, with_indices=True), Counter()
    usable, left_out = _leave_out_invalid(_prepare_rows(rows, prepare_row, args.dataset_num_proc), name)
    cut = sum(usable["prompt_cut"][:])
    if cut and args.process_index == 0:
        logger.warning(cut_message(name, cut, len(usable), args))
    return usable, left_out


def _prepare_rows(rows: Dataset, prepare_row: PromptRow, num_proc: int | None) -> Dataset:
    """Apply the row function to a map-style dataset; columns that are stored as JSON text stay so."""
    with kept_environment():
        prepared = rows.map(
            prepare_row,
            with_indices=True,
            features=_prepared_features(rows.features, prepare_row),
            num_proc=num_proc or None,  # 0: in this process
            desc=f"Preparing {prepare_row.name}",
        )
    others = [column for column in json_columns_of(rows) if column != "prompt"]
    return reading_json(prepared, [*others, *(["prompt"] if prepare_row.prompt_as_json else [])])


@dataclass(frozen=True)
class PromptRow:
    """The function that maps a row and its index to the five prepared columns. Picklable; its state is the cache key.

    ``raise_invalid``: an unusable row raises ``InvalidPromptError``; otherwise it gets a reason and no tokens.
    ``prompt_as_json``: the prompt is stored as JSON text (see `json_columns`).
    """

    tokenizer: PreTrainedTokenizerBase
    source: PromptSource
    kind: PromptKind
    limit: int | None
    truncate: bool
    raise_invalid: bool
    name: str
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    prompt_as_json: bool = False
    version: int = 4
    """Increase it when results change, so that datasets cached by older versions of this code are not reused."""

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Prepare one row.

        Raises:
            InvalidPromptError: the row is unusable and ``raise_invalid`` is set.
        """
        try:
            content = self.source.read(row)
            if isinstance(content, str) != (self.kind == "text"):
                raise UnusablePrompt(f"this row holds {_kind_of(content)}, other rows hold {self.kind}")
            if isinstance(content, str):
                fitted, ids = fit_text(self.tokenizer, content, self.limit, self.truncate)
            else:
                arguments = self._template_arguments(row)
                content = settled_messages(self.tokenizer, content, arguments)
                fitted, ids = fit_messages(self.tokenizer, content, arguments, self.limit, self.truncate)
        except UnusablePrompt as why:
            if self.raise_invalid:
                raise InvalidPromptError(
                    f"Row {index} of {self.name} cannot be used as a prompt ({self.source}): {why}. Correct the row, "
                    'or set `invalid_prompts="filter"` to leave such rows out; they are then counted.'
                ) from None
            empty = "" if self.kind == "text" else []
            return self._columns(empty, [], index, invalid=str(why))
        return self._columns(fitted, ids, index, cut=fitted is not content)  # a prompt that fits is returned unchanged

    def _columns(
        self, prompt: Any, ids: list[int], row: int, *, invalid: str | None = None, cut: bool = False
    ) -> dict[str, Any]:
        values = (json.dumps(prompt) if self.prompt_as_json else prompt, ids, row, invalid, cut)
        return dict(zip(PREPARED_COLUMNS, values, strict=True))

    def _template_arguments(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the chat template: the configuration's, overridden by the row's, and the row's tools."""
        own = row_arguments(row.get("chat_template_kwargs") or {}, self.tokenizer)
        arguments = {**self.chat_template_kwargs, **own}
        tools = row.get("tools")
        if isinstance(tools, str) and tools:
            try:
                tools = parse_json(tools)
            except ValueError as error:
                raise UnusablePrompt(f"its `tools` are no JSON ({error})") from None
        return {**arguments, "tools": without_nulls(tools)} if tools else arguments


def _as_dataset(dataset: Any, name: str) -> Dataset | IterableDataset:
    """The dataset without a format of its own; a list of dicts as a dataset."""
    if isinstance(dataset, Dataset):
        return reading_json(dataset, json_columns_of(dataset))
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if isinstance(dataset, list):
        wrong = [index for index, row in enumerate(dataset) if not isinstance(row, dict)]
        if wrong:
            raise TypeError(f"{name} is a list, so its rows must be dicts; row {wrong[0]} is {dataset[wrong[0]]!r}.")
        keys = [key for row in dataset for key in row if not isinstance(key, str)]
        if keys:
            raise TypeError(f"{name} is a list whose rows must have names as keys; one has {keys[0]!r}.")
        return dataset_from_rows(dataset)  # types may differ between rows; the row function reports unusable ones
    hint = f" Choose a split: {', '.join(map(str, dataset))}." if isinstance(dataset, Mapping) else ""
    raise TypeError(
        f"{name} must be a datasets.Dataset, a datasets.IterableDataset or a list of dicts, "
        f"not {type(dataset).__name__}.{hint}"
    )


def _checked_source(
    rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig, name: str
) -> PromptSource:
    """Find where the prompts are, after checks of the columns and arguments."""
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"{name} is empty. Give it at least one row.")
    columns = rows.column_names or list(first)
    _check_arguments(columns, tokenizer, args, name)
    source = find_source(columns, args.prompt_column, args.prompt_template)
    if "prompt" in columns and source.template is None and source.column != "prompt":
        logger.warning("%s: the prompts are read from %s and replace the column `prompt`.", name, source)
    return source


def _check_arguments(columns: list[str], tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig, name: str) -> None:
    taken = [column for column in ADDED_COLUMNS if column in columns]
    if taken:
        raise ValueError(f"{name} already has the columns {', '.join(taken)}, which preparation adds. Rename them.")
    check_arguments(_template_kwargs(args), tokenizer)
    if args.prompt_template is not None and args.prompt_column is not None:
        logger.warning("`prompt_column` is ignored: `prompt_template` is set.")


def _template_kwargs(args: OnlineDPOConfig) -> dict[str, Any]:
    assert not isinstance(args.chat_template_kwargs, str), "TrainingArguments parses text into a dict"
    return dict(args.chat_template_kwargs or {})


def _settle_kind(
    rows: Dataset | IterableDataset,
    source: PromptSource,
    tokenizer: PreTrainedTokenizerBase,
    args: OnlineDPOConfig,
    name: str,
) -> tuple[PromptSource, PromptKind]:
    """Decide whether prompts are text or messages, as in the first usable row. Rows of the other kind are invalid."""
    streaming = isinstance(rows, IterableDataset)
    kind: PromptKind | None = None
    from_transcript = False
    reasons: list[str] = []
    for row in itertools.islice(rows, _PROBED_STREAM_ROWS if streaming else None):
        try:
            kind = _kind_of(source.read(row))
        except UnusablePrompt as why:
            reasons.append(str(why))
            continue
        from_transcript = source.holds_transcripts and isinstance(row[source.column], str)
        break
    if kind is None and streaming and args.invalid_prompts == "filter":
        raise ValueError(
            f"None of the first {len(reasons)} rows of {name} is a usable prompt ({source}): {reasons[0]}."
        )
    if kind != "messages" or tokenizer.chat_template is not None or "chat_template" in _template_kwargs(args):
        return source, kind or "text"
    if from_transcript:
        logger.info("%s: the tokenizer has no chat template, so the transcripts of %s stay text.", name, source)
        return replace(source, transcript_as_text=True), "text"
    raise ValueError(
        f"{name} holds messages ({source}), but the tokenizer has no chat template. Set `tokenizer.chat_template`, use "
        "an instruction-tuned model's tokenizer, or give the prompts as text."
    )


def _kind_of(content: str | list[Message]) -> PromptKind:
    return "text" if isinstance(content, str) else "messages"


def _holds_parts(rows: Dataset | IterableDataset, source: PromptSource) -> bool:
    """Whether the messages of a table have lists of parts as their content. As prompts, some of them become text."""
    feature = (rows.features or {}).get(source.column)
    message = feature.feature if isinstance(feature, List) else None
    return isinstance(message, dict) and isinstance(message.get("content"), List)


def _prepared_features(features: Features, prepare_row: PromptRow) -> Features:
    """The types of a prepared dataset's columns.

    They are explicit, because inferred from a batch without invalid rows, ``prompt_invalid`` would get the null type.
    """
    source = prepare_row.source
    if prepare_row.kind == "text" or prepare_row.prompt_as_json:
        prompt = Value("string")
    elif source.holds_transcripts and isinstance(features[source.column], Value):
        prompt = List({"role": Value("string"), "content": Value("string")})
    else:
        prompt = features[source.column]
    added = {"prompt": prompt, "prompt_ids": List(Value("int32"))}
    return Features(
        {
            **features,
            **added,
            "prompt_row": Value("int64"),
            "prompt_invalid": Value("string"),
            "prompt_cut": Value("bool"),
        }
    )


def _leave_out_invalid(prepared: Dataset, name: str) -> tuple[Dataset, Counter[str]]:
    """The usable rows, and the number of the others by reason."""
    reasons: list[str | None] = prepared["prompt_invalid"][:]
    left_out = Counter(reason for reason in reasons if reason is not None)
    if not left_out:
        return prepared, left_out
    counts = "; ".join(f"{count} x {reason}" for reason, count in left_out.most_common())
    if left_out.total() == len(reasons):
        raise ValueError(f"No row of {name} is a usable prompt: {counts}.")
    logger.warning("%s: %d of %d rows are left out: %s.", name, left_out.total(), len(reasons), counts)
    return prepared.select([i for i, reason in enumerate(reasons) if reason is None]), left_out
