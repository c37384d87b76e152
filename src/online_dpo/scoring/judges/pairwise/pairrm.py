"""PairRM (Jiang et al. 2023, "LLM-Blender", arXiv 2306.02561) in the form of transformers, as in llm-blender/PairRM-hf.

Shapes: ``R`` texts of one forward pass, ``T`` tokens of a text, ``H`` hidden size, ``N`` tasks of the head (1 as
published).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DebertaV2Model, DebertaV2PreTrainedModel, PreTrainedTokenizerBase

from online_dpo.scoring.judges.llm.prompts import prompt_text
from online_dpo.scoring.judges.pairwise.reader import Text, device_of, padded, tokenised
from online_dpo.scoring.special_tokens import SpecialTokens
from online_dpo.types import Group

MARKS = {"source_prefix_id": "<|source|>", "cand1_prefix_id": "<|candidate1|>", "cand2_prefix_id": "<|candidate2|>"}
MAX_TOKENS = 2048
"""Length of prompt and both answers that the published model was trained with. The config does not say it, because
positions are relative."""


class DebertaV2PairRM(DebertaV2PreTrainedModel):
    """The PairRM model: an encoder reads the prompt and both answers, each after a marker token.

    A head rates an answer from the last hidden states at the prompt's marker and at the answer's marker. The difference
    of the two ratings is the log-odds that the first answer is better. The class and its parts have the names that are
    in the published weights.
    """

    base_model_prefix = "pretrained_model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(config.drop_out),
            nn.Linear(2 * config.hidden_size, config.hidden_size),
            nn.Tanh(),
            nn.Dropout(config.drop_out),
            nn.Linear(config.hidden_size, config.n_tasks),
        )
        self.mark_ids = tuple(getattr(config, field) for field in MARKS)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Compute log-odds of shape (R,); nan for a text in which a marker does not occur exactly once, for example
        because an answer contains one."""
        states_RTH = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows_R = torch.arange(len(input_ids), device=input_ids.device)
        states, ambiguous_R = [], torch.zeros_like(rows_R, dtype=torch.bool)
        for mark_id in self.mark_ids:
            is_mark_RT = input_ids == mark_id
            ambiguous_R |= is_mark_RT.sum(1) != 1
            states.append(states_RTH[rows_R, is_mark_RT.int().argmax(1)])
        source_RH, first_RH, second_RH = states
        first_RN = self.head_layer(torch.cat([source_RH, first_RH], dim=-1))
        second_RN = self.head_layer(torch.cat([source_RH, second_RH], dim=-1))
        return (first_RN - second_RN).mean(-1).float().masked_fill(ambiguous_R, torch.nan)


class PairRMReader:
    """The reader of PairRM. See :class:`PairwiseReader` for its members.

    Prompt and answers are tokenised separately, each with the tokenizer's special tokens: ``[CLS] <|source|> ... [SEP]
    [CLS] <|candidate1|> ... [SEP] [CLS] <|candidate2|> ... [SEP]``. The published code truncates them to ``max_tokens``
    in total; here a longer comparison is not read.

    Raises:
        ValueError: the tokenizer's ids of the marker tokens are not those of the config.
    """

    pads = True

    def __init__(
        self, model: DebertaV2PairRM, tokenizer: PreTrainedTokenizerBase, max_tokens: int = MAX_TOKENS
    ) -> None:
        for (field, mark), mark_id in zip(MARKS.items(), model.mark_ids, strict=True):
            if tokenizer.get_vocab().get(mark) != mark_id:
                raise ValueError(
                    f"The tokenizer does not have `{mark}` as token {mark_id}, as PairRM's config says in `{field}`. "
                    "Give the tokenizer that was saved with the model."
                )
        self.model = model
        self.tokenizer = tokenizer
        self._special_tokens = SpecialTokens(tokenizer)
        self.max_tokens = max_tokens

    def token_ids(self, comparisons: Sequence[Group]) -> list[Text]:
        """The token ids of each comparison, its three parts one after the other."""
        parts = []
        for comparison in comparisons:
            answers = (self._special_tokens.as_text(completion.text) for completion in comparison.completions)
            texts = (prompt_text(comparison.prompt), *answers)
            parts += [mark + text for mark, text in zip(MARKS.values(), texts, strict=True)]
        ids = iter(tokenised(self.tokenizer, parts))
        return [(*source, *first, *second) for source, first, second in zip(ids, ids, ids, strict=True)]

    @torch.no_grad()
    def log_odds(self, texts: Sequence[Text]) -> list[float]:
        """The log-odds that the first answer of each text is better, nan if a marker is ambiguous."""
        fill: Any = self.model.config.pad_token_id
        return self.model(*padded(texts, fill, device_of(self.model))).tolist()
