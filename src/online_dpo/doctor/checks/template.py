"""The chat template, and text to tokens and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from online_dpo.doctor.case import Case
from online_dpo.doctor.findings import Finding, ok, problem, warning
from online_dpo.doctor.registry import check

LOOKED_AT = 20


@check("template")
def template(case: Case) -> Iterator[Finding]:
    """Prompts render with a mark where the answer begins, one first token, and their tokens come back unchanged."""
    tokenizer, prompts = case.tokenizer, case.prompts[:LOOKED_AT]
    findings = []
    first = tokenizer.bos_token_id
    if first is not None and any(p.token_ids[:2] == (first, first) for p in prompts):
        findings.append(
            problem(
                f"prompts begin with {tokenizer.bos_token!r} twice",
                "The chat template, or the prompts, write it as well as the tokenizer. Take it out of one of them "
                "(`add_bos_token: false` in tokenizer_config.json).",
            )
        )
    chats = [prompt for prompt in prompts if prompt.is_conversational]
    if chats:
        findings += _chat(case, chats)
    findings += _round_trip(case)
    yield from findings
    if not findings:
        kind = "messages, rendered with the chat template" if chats else "plain text"
        yield ok(f"prompts are {kind}; texts come back from tokens as they were")


def _chat(case: Case, prompts: list[Any]) -> Iterator[Finding]:
    """Checks that the template marks where the answer begins."""
    arguments = dict(case.args.chat_template_kwargs or {})  # pyright: ignore[reportArgumentType, reportCallIssue]
    for prompt in prompts:
        if prompt.content[-1]["role"] == "assistant":
            continue
        texts = [
            case.tokenizer.apply_chat_template(
                prompt.content, **{**arguments, "tokenize": False, "add_generation_prompt": begins}
            )
            for begins in (True, False)
        ]
        if texts[0] == texts[1]:
            yield warning(
                "the chat template writes nothing where the answer begins (`add_generation_prompt` changes nothing)",
                "The policy may continue the user's message. Take the template of the instruction-tuned model.",
            )
        return


def _round_trip(case: Case) -> Iterator[Finding]:
    tokenizer = case.tokenizer
    texts = [p.content if isinstance(p.content, str) else str(p.content[-1]["content"]) for p in case.prompts]
    changed = []
    for text in texts[:LOOKED_AT]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(back, add_special_tokens=False)["input_ids"] != ids:
            changed.append((text, back))
    if changed:
        text, back = changed[0]
        yield problem(
            f"{len(changed)} of {len(texts[:LOOKED_AT])} texts do not come back from their tokens: {text[:60]!r} "
            f"becomes {back[:60]!r}",
            "The tokenizer's files do not fit each other, or its decoder is missing. Copy them from the model again.",
        )
