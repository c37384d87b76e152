"""Whether models know the tokens that they will meet.

Sizes are compared before anything is computed: a token without an embedding would end a run in the middle, with an
``IndexError: index out of range in self``. Only tokens that can occur count. Many published models have more embeddings
than tokens, and some tokenizers have tokens (for padding, mostly) that no text is ever turned into.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from online_dpo.errors import UnknownTokenError
from online_dpo.foreign import at_row
from online_dpo.modeling.introspection import context_length, unwrapped
from online_dpo.types import Group, Prompt

logger = logging.getLogger(__name__)

TOKEN_OPTIONS = (
    "eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
)
"""Options of `transformers.GenerationConfig` that hold token ids."""
SHOWN = 5


def embedding_rows(model: nn.Module) -> int:
    """How many tokens the model can read: ids from 0 to one less than this."""
    base: Any = unwrapped(model)
    if isinstance(base, PreTrainedModel):
        weight: Any = base.get_input_embeddings().weight
        return weight.shape[0]
    return base.config.get_text_config().vocab_size


def predicted_tokens(model: nn.Module) -> int:
    """How many tokens the model chooses from."""
    return unwrapped(model).config.get_text_config().vocab_size


@dataclass(frozen=True)
class VocabularyCheck:
    """Models that read the policy's token ids: by name, how many each knows.

    >>> VocabularyCheck({"the policy": 151936, "the reference": 151936})
    """

    rows: Mapping[str, int]

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """
        Raises:
            UnknownTokenError: a prompt has a token that one of the models does not know.
        """
        for prompt in prompts:
            self._check(prompt.token_ids, prompt, "The prompt")

    def check_groups(self, groups: Iterable[Group]) -> None:
        """
        Raises:
            UnknownTokenError: a completion has such a token.
        """
        for group in groups:
            for completion in group.completions:
                self._check(completion.token_ids, group.prompt, "A completion of the prompt")

    def _check(self, ids: tuple[int, ...], prompt: Prompt, what: str) -> None:
        highest = max(ids, default=0)
        for name, rows in self.rows.items():
            if highest >= rows:
                raise UnknownTokenError(f"{what} {at_row(prompt)} has token {highest}. {_size(name, rows)} {RESIZE}")


RESIZE = (
    "Where tokens were added to a tokenizer, its model needs embeddings for them: "
    "`model.resize_token_embeddings(len(tokenizer))`."
)


def check_policy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, datasets: Mapping[str, Any]) -> None:
    """
    Args:
        datasets: prepared ones, each as an error should call it. A stream is checked while it is read.

    Raises:
        UnknownTokenError: a prompt has a token that the model does not know, or the model can write one that it cannot
            read.
    """
    rows, written = embedding_rows(model), predicted_tokens(model)
    if written > rows:
        raise UnknownTokenError(
            f"The policy chooses from {written} tokens and has embeddings for {rows}, so it could not read what it "
            f"writes. {RESIZE}"
        )
    for name, dataset in datasets.items():
        found = highest_token(dataset)
        if found is not None and found >= rows:
            raise UnknownTokenError(
                f"`{name}` has prompts with token {found} ({tokenizer.convert_ids_to_tokens(found)!r}), first in row "
                f"{_first_row(dataset, rows)}. {_size('the policy', rows)} Its tokenizer has {len(tokenizer)} tokens. "
                f"{RESIZE}"
            )


def check_reference(
    reference: nn.Module, policy: nn.Module, tokenizer: PreTrainedTokenizerBase, datasets: Mapping[str, Any]
) -> None:
    """
    Raises:
        UnknownTokenError: the reference does not know a token that prompts have or the policy may write.
    """
    rows = embedding_rows(reference)
    highest = min(predicted_tokens(policy), _size_of(tokenizer)) - 1
    highest = max([highest, *(found for data in datasets.values() if (found := highest_token(data)) is not None)])
    if highest >= rows:
        raise UnknownTokenError(
            f"`ref_model` has embeddings for {rows} tokens (ids 0 to {rows - 1}), and the policy's prompts and "
            f"completions may have token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}). Give a `ref_model` "
            "with the policy's vocabulary, enlarge it like the policy "
            f"(`ref_model.resize_token_embeddings({highest + 1})`), or leave it out."
        )


def check_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, owner: str, chat: bool = False) -> None:
    """Compare a model that reads texts with its own tokenizer. Tokens that only stand in a text which spells them out
    get a warning.

    Args:
        owner: what messages call the model, such as "Reward model `name`".
        chat: whether texts go through the tokenizer's chat template.

    Raises:
        UnknownTokenError: ordinary texts have tokens that the model does not know.
    """
    rows = embedding_rows(model)
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not beyond:
        return
    ends = (getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep", "unk"))
    common = {i for i in ends if i is not None} | (beyond.keys() - tokenizer.added_tokens_decoder.keys())
    template = str(tokenizer.chat_template) if chat else ""
    certain = sorted(i for i, token in beyond.items() if i in common or token in template)
    listed = ", ".join(f"{i} ({beyond[i]!r})" for i in (certain or sorted(beyond))[:SHOWN])
    said = f"{owner} has embeddings for {rows} tokens (ids 0 to {rows - 1}), but its tokenizer has {len(tokenizer)}"
    if certain:
        raise UnknownTokenError(
            f"{said}, among them {listed}, which texts are turned into. Give the tokenizer that the model was trained "
            "with, or one row for each token: `model.resize_token_embeddings(len(tokenizer))` (new rows are untrained)."
        )
    logger.warning("%s: a text that spells out %s cannot be read.", said, listed)


def check_known(ids: Sequence[int], rows: int, owner: str, prompt: Prompt) -> None:
    """
    Raises:
        UnknownTokenError: a text that ``owner`` is to read has a token beyond its ``rows`` embeddings.
    """
    highest = max(ids, default=0)
    if highest >= rows:
        raise UnknownTokenError(
            f"{_size(owner, rows)} A text that it should read has token {highest} {at_row(prompt)}."
        )


def check_options(model: nn.Module, options: Mapping[str, Any]) -> None:
    """
    Raises:
        UnknownTokenError: one of ``generation_kwargs`` holds a token id that the model does not choose from.
    """
    known = predicted_tokens(model)
    for name in TOKEN_OPTIONS:
        wrong = [i for i in _numbers(options.get(name)) if not 0 <= i < known]
        if wrong:
            raise UnknownTokenError(
                f"`generation_kwargs`: `{name}` holds {wrong[0]}, but the policy chooses from {known} tokens (ids 0 to "
                f"{known - 1})."
            )


def check_room(model: nn.Module, longest: int | None, argument: str) -> None:
    """
    Args:
        longest: tokens of a prompt and its completion; ``None``: any number.

    Raises:
        ValueError: the model has not room for them.
    """
    context = context_length(model)
    if context is not None and (longest is None or longest > context):
        raise ValueError(
            f"`{argument}` has room for {context} tokens, prompts and completions may have "
            f"{'any number' if longest is None else longest}. Set `max_length` to at most {context}."
        )


def highest_token(dataset: Any) -> int | None:
    """The highest token id of a prepared dataset's prompts; ``None`` where it is a stream or has no tokens."""
    if not isinstance(dataset, Dataset):
        return None
    tables = dataset.select_columns("prompt_ids").with_format("arrow").iter(batch_size=10_000)
    found = (pc.max(pc.list_flatten(table.column("prompt_ids"))).as_py() for table in tables)  # pyright: ignore
    return max((highest for highest in found if highest is not None), default=None)


def _first_row(dataset: Dataset, rows: int) -> int:
    return next(row["prompt_row"] for row in dataset if max(row["prompt_ids"], default=0) >= rows)  # pyright: ignore


def _size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the tokenizer's highest id; there may be holes below."""
    return max(tokenizer.get_vocab().values()) + 1


def _size(name: str, rows: int) -> str:
    return f"{name[0].upper()}{name[1:]} has embeddings for {rows} tokens (ids 0 to {rows - 1})."


def _numbers(value: Any) -> Iterator[int]:
    """The ids in a number, a list of them, or a list of lists."""
    if isinstance(value, int):
        yield value
    for item in value if isinstance(value, (list, tuple)) else ():
        yield from _numbers(item)
