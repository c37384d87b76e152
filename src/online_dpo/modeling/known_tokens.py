"""Checks that models have an embedding for every token id they will be given.

Sizes are compared before anything is computed: a token without an embedding would end a run in the middle, with an
``IndexError: index out of range in self``. Only tokens that can occur count. Many published models have more embeddings
than their tokenizer has tokens, and some tokenizers have tokens (mostly for padding) that no text is encoded to.
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

from online_dpo.distributed.weights import shape_of
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
    """The number of input embeddings: the model can read token ids from 0 to one less than this."""
    base: Any = unwrapped(model)
    if isinstance(base, PreTrainedModel):
        weight: Any = base.get_input_embeddings().weight
        return shape_of(weight)[0]
    return base.config.get_text_config().vocab_size


def predicted_tokens(model: nn.Module) -> int:
    """The size of the output vocabulary: the number of tokens the model chooses from."""
    return unwrapped(model).config.get_text_config().vocab_size


@dataclass(frozen=True)
class VocabularyCheck:
    """Checks token ids of prompts and completions against the embeddings of all models that read them.

    ``rows`` has the number of embeddings of each model, by the name that messages use.

    >>> VocabularyCheck({"the policy": 151936, "the reference": 151936})
    """

    rows: Mapping[str, int]

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Checks the tokens of prompts.

        Raises:
            UnknownTokenError: a prompt has a token for which one of the models has no embedding.
        """
        for prompt in prompts:
            self._check(prompt.token_ids, prompt, "The prompt")

    def check_groups(self, groups: Iterable[Group]) -> None:
        """Checks the tokens of completions.

        Raises:
            UnknownTokenError: a completion has a token for which one of the models has no embedding.
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
    """Checks that the policy can read the prompts of all datasets, and every token it can sample itself.

    Args:
        datasets: prepared datasets by the name that messages use. A stream is checked later, while it is read.

    Raises:
        UnknownTokenError: a prompt has a token without an embedding, or the policy can sample one.
    """
    rows, vocabulary = embedding_rows(model), predicted_tokens(model)
    if vocabulary > rows:
        raise UnknownTokenError(
            f"The policy chooses from {vocabulary} tokens and has embeddings for {rows}, so it could not read its own "
            f"completions. {RESIZE}"
        )
    for name, dataset in datasets.items():
        highest = highest_token(dataset)
        if highest is not None and highest >= rows:
            raise UnknownTokenError(
                f"`{name}` has prompts with token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), first in "
                f"row {_first_row(dataset, rows)}. {_size('the policy', rows)} Its tokenizer has {len(tokenizer)} "
                f"tokens. {RESIZE}"
            )


def check_reference(
    reference: nn.Module, policy: nn.Module, tokenizer: PreTrainedTokenizerBase, datasets: Mapping[str, Any]
) -> None:
    """Checks that the reference has an embedding for every token of the prompts and of possible completions.

    Raises:
        UnknownTokenError: it has none for a token that occurs in prompts or that the policy may sample.
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
    """Checks that a model which reads texts has an embedding for the tokens of its own tokenizer.

    Added tokens that occur only in texts which contain their literal name (such as ``<|tool|>``) give a warning instead
    of an error.

    Args:
        owner: the name of the model in messages, such as "Reward model `name`".
        chat: whether texts are formatted with the tokenizer's chat template.

    Raises:
        UnknownTokenError: tokens of ordinary texts, or of every text, have no embedding.
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
    sizes = f"{owner} has embeddings for {rows} tokens (ids 0 to {rows - 1}), but its tokenizer has {len(tokenizer)}"
    if certain:
        raise UnknownTokenError(
            f"{sizes}, among them {listed}, which occur in texts. Give the tokenizer that the model was trained with, "
            "or one row for each token: `model.resize_token_embeddings(len(tokenizer))` (new rows are untrained)."
        )
    logger.warning("%s: a text that contains %s literally cannot be read.", sizes, listed)


def check_known(ids: Sequence[int], rows: int, owner: str, prompt: Prompt) -> None:
    """Checks the token ids of one text that the model ``owner``, with ``rows`` embeddings, is to read.

    Raises:
        UnknownTokenError: an id has no embedding.
    """
    highest = max(ids, default=0)
    if highest >= rows:
        raise UnknownTokenError(
            f"{_size(owner, rows)} A text that it should read has token {highest} {at_row(prompt)}."
        )


def check_options(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Checks the token ids in ``generation_kwargs``.

    Raises:
        UnknownTokenError: one is outside of the model's output vocabulary.
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
    """Checks that a prompt with its completion fits into the model's context.

    Args:
        longest: the largest number of tokens of a prompt and its completion; ``None``: any number.
        argument: the trainer's argument that gave the model.

    Raises:
        ValueError: the context length is smaller.
    """
    context = context_length(model)
    if context is not None and (longest is None or longest > context):
        raise ValueError(
            f"`{argument}` has room for {context} tokens, prompts and completions may have "
            f"{'any number' if longest is None else longest}. Set `max_length` to at most {context}."
        )


def highest_token(dataset: Any) -> int | None:
    """The highest token id in the prompts of a prepared dataset; ``None`` if it is a stream or has no tokens."""
    if not isinstance(dataset, Dataset):
        return None
    tables = dataset.select_columns("prompt_ids").with_format("arrow").iter(batch_size=10_000)
    maxima = (pc.max(pc.list_flatten(table.column("prompt_ids"))).as_py() for table in tables)  # pyright: ignore
    return max((highest for highest in maxima if highest is not None), default=None)


def _first_row(dataset: Dataset, rows: int) -> int:
    """The number of the first row whose prompt has a token id of ``rows`` or more."""
    return next(row["prompt_row"] for row in dataset if max(row["prompt_ids"], default=0) >= rows)  # pyright: ignore


def _size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the tokenizer's highest id. Its ids may have gaps, so ``len`` would be too low."""
    return max(tokenizer.get_vocab().values()) + 1


def _size(name: str, rows: int) -> str:
    return f"{name[0].upper()}{name[1:]} has embeddings for {rows} tokens (ids 0 to {rows - 1})."


def _numbers(value: Any) -> Iterator[int]:
    """The token ids in an option: a number, a list of numbers, or a list of lists."""
    if isinstance(value, int):
        yield value
    for item in value if isinstance(value, (list, tuple)) else ():
        yield from _numbers(item)
