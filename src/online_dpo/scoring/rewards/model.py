"""Sequence-classification reward models as scorers.

Shapes: ``R`` texts of one forward pass, ``T`` tokens of a text, ``P`` prompts, ``K`` completions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from online_dpo.distributed.device_memory import free_kept_memory
from online_dpo.distributed.weights import make_whole
from online_dpo.errors import ModelFolderError, ScoringError
from online_dpo.foreign import among_rows, at_row, foreign
from online_dpo.modeling.attention.choice import choose_attention
from online_dpo.modeling.attention.rows import fitted_length
from online_dpo.modeling.borrowing import eval_mode
from online_dpo.modeling.fingerprint import weights_fingerprint
from online_dpo.modeling.introspection import context_length
from online_dpo.modeling.known_tokens import check_known, check_tokenizer, embedding_rows
from online_dpo.modeling.last_layer import enable_selective_last_layer
from online_dpo.modeling.memory import Halving, in_memory
from online_dpo.modeling.onednn import onednn_linears
from online_dpo.modeling.weight_casts import weights_cast_once
from online_dpo.packing.prefix_tree import Tree
from online_dpo.scoring.chat_templates import check_template
from online_dpo.scoring.protocols import chat_messages, one_at_a_time, regroup
from online_dpo.scoring.rewards.loading import check_reward_model, last_part, load_tokenizer, no_tokenizer
from online_dpo.scoring.rewards.shared_prefix import Text, group_trees, has_score_head, may_share, passes, score_trees
from online_dpo.scoring.special_tokens import SpecialTokens
from online_dpo.scoring.time_limit import call_in_time
from online_dpo.types import Completion, Group, Prompt

logger = logging.getLogger(__name__)

MOST_TOKENS = {"cpu": 1024}
"""Tokens of one forward pass over shared rows, by device type. On a CPU, larger passes are slower."""


class RewardModelScorer:
    """A reward model: the score is the logit of a sequence-classification model with one label.

    The prompt and completion are tokenised for the reward model. A conversational prompt and its completion are
    rendered with the reward tokenizer's chat template. A text prompt and its completion are tokenised with that
    tokenizer's own special tokens, and end with its EOS only if the completion ended by itself. Texts that are too long
    for the model lose tokens on the left (a leading BOS or CLS stays); ``truncated`` counts them since construction.

    Equal texts are computed once, so that their scores tie. Tokenizer, config and the training mode of each module are
    the same after scoring as before. The model runs on the device of its parameters; the caller (or ``prepare``) moves
    it there.

    The common prefix of a group's texts is computed once, provided that this gives the first such texts the scores
    that they get alone. Otherwise, or if nothing would be saved, each text is a padded row.

    Args:
        model: a model of transformers or PEFT: an ``nn.Module`` with a ``config``.
        tokenizer: the reward model's tokenizer; by default loaded from the model's path.
        name: name in metrics; by default the last part of the model's path.
        batch_size: texts in one forward pass.
        prepare: called once with the model; its result is used (``Accelerator.prepare_model``, for example).
        share_prompts: whether common prefixes may be computed once.
        flex_attention: whether they are read through FlexAttention; by default on CUDA where the model can.
        unfit_for_flex: why the run cannot use it, whatever the model.

    Raises:
        TypeError: the model has no config of transformers.
        ValueError: the model has more than one label, no tokenizer was found, the tokenizer has tokens that the model
            does not know, or (when scoring) a prompt is conversational and the tokenizer has no chat template.
        ScoringError: (when scoring) the shape of the logits is not ``(R, 1)``, or the model, its tokenizer or its chat
            template raised an error.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str | None = None,
        batch_size: int = 16,
        prepare: Callable[[nn.Module], nn.Module] | None = None,
        share_prompts: bool = True,
        flex_attention: bool | None = None,
        unfit_for_flex: str | None = None,
    ) -> None:
        config = check_reward_model(model)
        make_whole(model)
        self.name = name or last_part(config._name_or_path) or type(model).__name__
        if tokenizer is None:
            if not config._name_or_path:
                raise ValueError(no_tokenizer(self.name))
            tokenizer = load_tokenizer(config._name_or_path)
        check_tokenizer(model, tokenizer, f"Reward model `{self.name}`")
        enable_selective_last_layer(model)
        self.model = model if prepare is None else prepare(model)
        # Only now: it is loaded on a CPU, and `prepare` moves it to its device.
        device = next(self.model.parameters()).device
        share = share_prompts and has_score_head(model)
        choose_attention(model, f"reward model `{self.name}`", device, share, flex_attention, unfit_for_flex)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._most_tokens = MOST_TOKENS.get(next(self.model.parameters()).device.type, math.inf)
        self.truncated = 0
        self._shares: bool | None = None if share_prompts else False  # None: not checked yet
        self._config = config.get_text_config()
        # Some configs use another name for it. It only serves to estimate costs, so a typical size will do.
        self._fitting = Halving(f"Reward model `{self.name}`")
        self._hidden_size = getattr(self._config, "hidden_size", 1024)
        self._known_tokens = embedding_rows(model)
        self._special_tokens = SpecialTokens(tokenizer)
        self._max_tokens = longest_text(model, tokenizer)
        self._positions = context_length(model)

    def check_chat_template(self) -> None:
        """Check that conversational prompts can be scored. To be called before sampling, so that a run fails early.

        Raises:
            ValueError: the reward tokenizer has no chat template, or one with tokens that the model does not know.
        """
        self._need_chat_template()
        check_tokenizer(self.model, self.tokenizer, f"Reward model `{self.name}`", chat=True)
        check_template(self.tokenizer, f"reward model `{self.name}`")

    def _need_chat_template(self) -> None:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of reward model `{self.name}` has no chat template, so it cannot read conversational "
                "prompts. Set its `chat_template` and pass it in `reward_processing_classes`, or use text prompts."
            )

    def identity(self) -> dict[str, str]:
        """Returns the fingerprint of the model's weights."""
        return {"weights": weights_fingerprint(self.model)}

    def score(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Return P x K logits in fp32, including any that are not finite. Several threads take turns."""
        who, rows = f"Reward model `{self.name}`", partial(among_rows, groups)
        with one_at_a_time, foreign(who, rows):
            return call_in_time(partial(self._logits, groups), who, rows)

    def _logits(self, groups: Sequence[Group]) -> list[list[float | None]]:
        texts = self._token_ids([(group.prompt, answer) for group in groups for answer in group.completions])
        with eval_mode(self.model), weights_cast_once(self.model), onednn_linears(self.model, pack=False):
            values = self._values(regroup(texts, groups))
        return regroup([values[text] for text in texts], groups)

    def _values(self, texts_PK: list[list[Text]]) -> dict[Text, float]:
        """The score of each text, from shared rows where the model allows them and they save work."""
        read = {text: self._read_part(text) for texts in texts_PK for text in texts}
        read_PK = [[read[text] for text in texts] for texts in texts_PK]
        trees = group_trees(read_PK, self.batch_size, self._hidden_size)
        if all(len(tree.branches) == 1 for tree in trees) or not self._may_share(trees, read):
            return self._plain_values(read)
        values: dict[Text, float] = {}
        for batch in passes(trees, self.batch_size, self._most_tokens):
            with in_memory() as attempt:
                values |= score_trees(self.model, batch)
            if not attempt.fits:  # what is missing is computed below, in rows of their own
                self._most_tokens = sum(tree.size for tree in batch) // 2
                free_kept_memory()
        # A text's nan spreads to the texts after it in the row, and texts of a single token are in no row: both are
        # computed again as padded rows.
        values |= self._plain_values(part for part in read.values() if not math.isfinite(values.get(part, math.nan)))
        return {text: values[part] for text, part in read.items()}

    def _plain_values(self, texts: Iterable[Text]) -> dict[Text, float]:
        """The score of each text, from padded rows of similar length."""
        longest_first = sorted(dict.fromkeys(texts), key=len, reverse=True)
        values: dict[Text, float] = {}
        for start in range(0, len(longest_first), self.batch_size):
            batch = longest_first[start : start + self.batch_size]
            values.update(zip(batch, self._fitting(batch, self._forward), strict=True))
        return values

    def _may_share(self, trees: list[Tree], read: dict[Text, Text]) -> bool:
        """Whether shared rows give the right scores. Checked on the first trees, then kept for the whole run."""
        if self._shares is None:
            whole = {part: text for text, part in read.items()}
            self._shares = may_share(
                self.model,
                self.name,
                trees,
                lambda parts: self._fitting([whole[part] for part in parts], self._forward),
            )
        return self._shares

    def _token_ids(self, samples: list[tuple[Prompt, Completion]]) -> list[Text]:
        """The token ids of each prompt with its completion, truncated and checked."""
        token_ids: list[Text] = [()] * len(samples)
        for conversational in (False, True):
            chosen = [i for i, (prompt, _) in enumerate(samples) if prompt.is_conversational is conversational]
            if not chosen:
                continue
            written = self._conversation if conversational else self._text
            texts = [written(*samples[i]) for i in chosen]
            # The chat template writes the special tokens itself.
            encoded: Mapping[str, Any] = self.tokenizer(
                texts, add_special_tokens=not conversational, truncation=False, verbose=False
            )
            for i, ids in zip(chosen, encoded["input_ids"], strict=True):
                if not conversational:
                    ids = self._with_own_ends(ids, ended=samples[i][1].finish_reason == "stop")
                token_ids[i] = tuple(self._truncate_and_count(ids))
                check_known(token_ids[i], self._known_tokens, f"Reward model `{self.name}`", samples[i][0])
        return token_ids

    def _conversation(self, prompt: Prompt, completion: Completion) -> str:
        self._need_chat_template()
        messages = chat_messages(prompt)
        if messages[-1]["role"] == "assistant":
            begun = messages[-1]["content"]
            messages[-1]["content"] = begun + self._special_tokens.as_text(completion.text, begun)
        else:
            messages.append({"role": "assistant", "content": self._special_tokens.as_text(completion.text)})
        with foreign(f"The chat template of reward model `{self.name}`", lambda: at_row(prompt)):
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        assert isinstance(text, str)
        return text

    def _text(self, prompt: Prompt, completion: Completion) -> str:
        assert isinstance(prompt.content, str)
        return prompt.content + self._special_tokens.as_text(completion.text, prompt.content)

    def _with_own_ends(self, ids: list[int], ended: bool) -> list[int]:
        """The ids with one BOS, even if the prompt's text begins with it, and one EOS if the completion ended, else
        none."""
        bos: Any = self.tokenizer.bos_token_id
        eos: Any = self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        # Encoders whose EOS is their separator expect it at the end of every text, complete or not.
        if eos is None or eos == self.tokenizer.sep_token_id:
            return ids
        while len(ids) > 1 and ids[-1] == eos:
            ids = ids[:-1]
        return [*ids, eos] if ended else ids

    def _truncate_and_count(self, ids: list[int]) -> list[int]:
        """Cut ids on the left to what the model can read, and count the text in ``truncated``."""
        if len(ids) <= self._max_tokens:
            return ids
        if not self.truncated:
            logger.warning(
                "Reward model `%s` reads %d tokens at most. A text of %d was cut on the left; others are counted.",
                self.name,
                self._max_tokens,
                len(ids),
            )
        self.truncated += 1
        kept = 1 if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else 0
        return ids[:kept] + ids[len(ids) - self._max_tokens + kept :]

    def _forward(self, batch: Sequence[Text]) -> list[float]:
        """The scores of one batch of padded rows."""
        fill = self._fill_token(batch)
        device = next(self.model.parameters()).device
        length = fitted_length(max(len(ids) for ids in batch), device, self._positions)
        ids_RT = torch.tensor([[*ids, *[fill] * (length - len(ids))] for ids in batch], device=device)
        mask_RT = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in batch], device=device)
        with torch.no_grad(), overridden(self._config, pad_token_id=fill, use_cache=False):
            logits_R1 = self.model(input_ids=ids_RT, attention_mask=mask_RT).logits
        if logits_R1.shape != (len(batch), 1):
            raise ScoringError(
                f"Reward model `{self.name}` returned logits of shape {tuple(logits_R1.shape)} for {len(batch)} texts; "
                f"a reward model returns ({len(batch)}, 1)."
            )
        return logits_R1[:, 0].float().tolist()

    def _fill_token(self, batch: Sequence[Text]) -> int:
        """The padding token with which each row gets the score that its text gets alone and without padding.

        The head of a decoder scores the last token that is not ``config.pad_token_id``. It also skips real tokens at
        the end of a text if they equal the padding token, so padding with the config's token changes nothing. If the
        config has no padding token, a text alone is scored at its very last token; in a batch the head finds the same
        token if no text ends with the token used for padding.
        """
        pad = self._padding_token()
        if pad is not None:
            return pad
        last_tokens = {ids[-1] for ids in batch}
        return next(token for token in range(self._known_tokens) if token not in last_tokens)

    def _padding_token(self) -> int | None:
        """The config's padding token, ``None`` if it has none or the model has no embedding for it."""
        pad = self._config.pad_token_id
        return pad if pad is not None and 0 <= pad < self._known_tokens else None

    def _read_part(self, text: Text) -> Text:
        """The text up to the token that a decoder's head scores (see `_fill_token`); later tokens have no effect.

        If the text has only padding tokens, the head scores the first of them.
        """
        pad = self._padding_token()
        end = next((i for i in range(len(text), 0, -1) if text[i - 1] != pad), 1)
        return text[:end]


def longest_text(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest text, in tokens, that both the model and its tokenizer accept.

    Raises:
        ModelFolderError: it is no number above zero.
    """
    limit: Any = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 1:
        raise ModelFolderError(
            f"`{tokenizer.name_or_path}`: `model_max_length` of the tokenizer is {limit!r}. Correct it."
        )
    return min(tokenizer.model_max_length, context_length(model) or tokenizer.model_max_length)


@contextmanager
def overridden(config: PreTrainedConfig, **values: Any) -> Iterator[None]:
    """Set fields of a model's config for one forward pass, because transformers reads them only from the config.

    Fields that the config does not have are left out. The old values are restored, also after an error.
    """
    before = {name: getattr(config, name) for name in values if hasattr(config, name)}
    try:
        for name in before:
            setattr(config, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
