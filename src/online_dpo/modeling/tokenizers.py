"""Checks of tokenizers that must agree: the policy's, and that of a reference which reads the policy's tokens."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from online_dpo.errors import ModelFolderError
from online_dpo.foreign import loading
from online_dpo.modeling.loading import source_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


def check_same_words(reference: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a reference from a folder was trained with the words that the policy's tokenizer has for its ids.

    Where the folder has no tokenizer, this cannot be seen. Added tokens may differ: a fine-tuned model often has new
    names for reserved ones.

    Raises:
        ModelFolderError: an id means another word to the reference.
    """
    path = source_of(reference)
    if path is None or not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        return
    with loading(path):
        other = AutoTokenizer.from_pretrained(path)
    own, its = _words(tokenizer), _words(other)
    differing = sorted(i for i in own.keys() & its.keys() if own[i] != its[i])
    if differing:
        first = differing[0]
        raise ModelFolderError(
            f"`ref_model` {path} was trained with another tokenizer than the policy: token {first} is {its[first]!r} "
            f"to it and {own[first]!r} to the policy, and {len(differing)} tokens differ in all. Give a reference with "
            "the policy's tokenizer, or leave `ref_model` out."
        )


def _words(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The words by their ids, without added tokens."""
    added = tokenizer.added_tokens_decoder.keys()
    return {i: word for word, i in tokenizer.get_vocab().items() if i not in added}
