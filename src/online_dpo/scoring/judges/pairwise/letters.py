"""Causal language models that name the better of two answers with a letter, such as RLHFlow's preference models (Dong
et al. 2024, "RLHF Workflow", arXiv 2405.07863).

Shapes: ``R`` texts of one forward pass, ``T`` tokens of a text, ``U`` distinct positions of last tokens, ``V``
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from online_dpo.scoring.judges.llm.prompts import Template, prompt_text
from online_dpo.scoring.judges.pairwise.reader import Text, device_of, padded, tokenised
from online_dpo.scoring.protocols import chat_messages
from online_dpo.scoring.rewards.model import longest_text
from online_dpo.scoring.special_tokens import SpecialTokens
from online_dpo.types import Group, Prompt

RLHFLOW = "[CONTEXT] {prompt} [RESPONSE A] {first} [RESPONSE B] {second} \n"


class LetterReader:
    """The reader of a causal language model: log-odds are the difference of two letters' logits for the next token.

    The question is one user message in the tokenizer's chat template, or plain text if there is none. Without a
    ``template`` it is RLHFlow's question as published, with its own marks for turns and without a BOS. See
    :class:`PairwiseReader` for the members.

    Raises:
        ValueError: a letter is not one token, or there is no chat template for RLHFlow's question.
    """

    pads = True  # on the right: in a causal model, earlier tokens do not attend to padding

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        letters: Sequence[str] = ("A", "B"),
    ) -> None:
        if template is None and tokenizer.chat_template is None:
            raise ValueError(
                "The judge's tokenizer has no chat template, which RLHFlow's format needs. Give the `template` that "
                "the model was trained with."
            )
        self.model = model
        self.tokenizer = tokenizer
        self._special_tokens = SpecialTokens(tokenizer)
        self.max_tokens = longest_text(model, tokenizer)
        self._published = template is None
        self._template = Template("", template or RLHFLOW, max_tokens=0)
        self._first, self._second = (self._letter_id(letter) for letter in letters)

    def token_ids(self, comparisons: Sequence[Group]) -> list[Text]:
        """The token ids of each comparison as a question."""
        chat = self.tokenizer.chat_template is not None
        texts = [
            self._in_chat(self._question(comparison)) if chat else self._question(comparison)
            for comparison in comparisons
        ]
        # The chat template writes the special tokens itself.
        return [tuple(ids) for ids in tokenised(self.tokenizer, texts, special=not chat)]

    @torch.no_grad()
    def log_odds(self, texts: Sequence[Text]) -> list[float]:
        """The difference of the first and second letter's logits after each text."""
        ids_RT, mask_RT = padded(texts, fill=0, device=device_of(self.model))
        positions_U, index_R = (mask_RT.sum(1) - 1).unique(return_inverse=True)
        rows_R = torch.arange(len(texts), device=ids_RT.device)

        def last_of_each(_head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (args[0][rows_R, index_R][:, None],)  # otherwise the head would compute R x U x V logits

        head: nn.Module = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        with head.register_forward_pre_hook(last_of_each):
            output = self.model(input_ids=ids_RT, attention_mask=mask_RT, logits_to_keep=positions_U, use_cache=False)
        logits_RV = output.logits[:, 0].float()
        return (logits_RV[:, self._first] - logits_RV[:, self._second]).tolist()

    def _question(self, comparison: Group) -> str:
        prompt = _turns(comparison.prompt) if self._published else prompt_text(comparison.prompt)
        answers = (self._special_tokens.as_text(completion.text) for completion in comparison.completions)
        return self._template.fill("", prompt, *answers)

    def _in_chat(self, question: str) -> str:
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        bos = self.tokenizer.bos_token
        return text.replace(bos, "") if self._published and isinstance(bos, str) else text

    def _letter_id(self, letter: str) -> int:
        ids = self.tokenizer.encode(letter, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(f"The answer {letter!r} is not one token of the judge's tokenizer. Give other `letters`.")
        return ids[0]


def _turns(prompt: Prompt) -> str:
    """A prompt as a conversation with RLHFlow's marks for turns."""
    messages = (
        [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else chat_messages(prompt)
    )
    return "\n" + "".join(f"\n<turn> {message['role']}\n {message['content']}" for message in messages) + "\n"
