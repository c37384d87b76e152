"""Tokenizer and end tokens of the policy and the reward model, and the sizes of their vocabularies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, ok, problem, warning
from online_dpo.doctor.registry import check
from online_dpo.scoring.rewards.loading import load_tokenizer

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|assistant_end|>", "<|endofturn|>")
"""Tokens with which well-known chat templates end an answer."""


@check("tokens")
def tokens(case: Case) -> Iterator[Finding]:
    """The policy's tokenizer against its model: end tokens, padding, sizes; then the reward model's."""
    findings = [*_sizes(case), *_ends(case)]
    if case.subject.reward_model is not None:
        findings += _reward_tokens(case, case.subject.reward_model)
    yield from findings
    if not findings:
        tokenizer = case.tokenizer
        yield ok(f"{len(tokenizer)} tokens; a completion ends with {', '.join(map(repr, _end_tokens(case)))}")


def _sizes(case: Case) -> Iterator[Finding]:
    tokenizer, rows = case.tokenizer, case.counts.embedding_rows
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        yield problem(
            f"the tokenizer has token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), the model has "
            f"embeddings for {rows}",
            "Take the tokenizer that belongs to the model, or save the model after "
            "`model.resize_token_embeddings(len(tokenizer))`.",
        )


def _end_ids(case: Case) -> tuple[list[int], list[int]]:
    """The ids of end tokens by the tokenizer, and by the model's generation config."""
    own: Any = case.tokenizer.eos_token_id
    config: Any = case.config
    path = Path(os.path.expanduser(case.subject.model))
    if not path.is_dir() or (path / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(case.subject.model)
    given = config.eos_token_id
    model = [] if given is None else [given] if isinstance(given, int) else list(given)
    return [] if own is None else [own], model


def _end_tokens(case: Case) -> list[str]:
    own, model = _end_ids(case)
    known = case.counts.embedding_rows
    return [str(case.tokenizer.convert_ids_to_tokens(i)) for i in sorted({*own, *model}) if 0 <= i < known]


def _ends(case: Case) -> Iterator[Finding]:
    tokenizer, known = case.tokenizer, case.counts.embedding_rows
    own, model = _end_ids(case)
    usable = [i for i in {*own, *model} if 0 <= i < known]
    if not usable:
        yield problem(
            f"no token ends a completion: the tokenizer's is {tokenizer.eos_token!r}, the model's are {model}",
            "Set `eos_token` in tokenizer_config.json, or `eos_token_id` in generation_config.json, to a token that "
            "the model writes at the end of an answer.",
        )
        return
    if own and model and not set(own) & set(model):
        yield warning(
            f"the tokenizer ends a text with {_names(tokenizer, own)}, and the model's generation config with "
            f"{_names(tokenizer, model)}",
            "Make `eos_token_id` in generation_config.json and `eos_token` in tokenizer_config.json agree. Both end a "
            "completion here.",
        )
    if tokenizer.chat_template is not None and case.prompts[0].is_conversational:
        yield from _end_of_turn(case, usable)


def _end_of_turn(case: Case, ends: list[int]) -> Iterator[Finding]:
    """Checks that the token which the chat template writes after an answer ends a completion."""
    tokenizer = case.tokenizer
    vocabulary = tokenizer.get_vocab()
    marks = [mark for mark in TURN_ENDS if mark in vocabulary and mark in str(tokenizer.chat_template)]
    wrong = [mark for mark in marks if vocabulary[mark] not in ends]
    if marks and wrong == marks:
        yield problem(
            f"the chat template ends an answer with {marks[0]!r}, and only {_names(tokenizer, ends)} ends a "
            "completion: the policy would go on and write the next turn",
            f"Add {vocabulary[marks[0]]} to `eos_token_id` in the model's generation_config.json.",
        )


def _names(tokenizer: Any, ids: list[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids)


def _reward_tokens(case: Case, path: str) -> Iterator[Finding]:
    """Checks the tokenizer of a reward model in a folder."""
    config = case.config_of(path)
    tokenizer = load_tokenizer(os.path.expanduser(path), trust_remote_code=case.args.trust_remote_code)
    rows = config.get_text_config().vocab_size
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        yield problem(
            f"the reward model {path} has embeddings for {rows} tokens, and its tokenizer has token {highest}",
            "Take the tokenizer that the reward model was trained with.",
        )
    if tokenizer.pad_token_id is None and config.pad_token_id is None and tokenizer.eos_token_id is None:
        yield problem(
            f"the reward model {path} has no pad token, and no end token to pad with",
            "Set `pad_token` in its tokenizer_config.json, and `pad_token_id` in its config.json.",
        )
    elif config.pad_token_id is None:
        yield warning(
            f"config.json of the reward model {path} has no `pad_token_id`",
            "Set it to the id of its tokenizer's pad token, so that other programs find the last token of a text.",
        )
    elif tokenizer.pad_token_id is not None and tokenizer.pad_token_id != config.pad_token_id:
        yield warning(
            f"the reward model {path} pads with token {config.pad_token_id} by config.json, its tokenizer with "
            f"{tokenizer.pad_token_id}",
            "Make `pad_token_id` in config.json that of the tokenizer.",
        )
