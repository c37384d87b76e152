"""A check of the chat templates of models that score, made before anything is sampled."""

from __future__ import annotations

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase

from online_dpo.data.template_limits import template_limits
from online_dpo.distributed.signals import is_interruption
from online_dpo.errors import named_error

ANSWERS = ("alpha", "omega")


def check_template(tokenizer: PreTrainedTokenizerBase, owner: str) -> None:
    """Check that the chat template of a scorer ends, and writes what it is given.

    A template that refuses the messages tried here is not refused: it may want others.

    Raises:
        ValueError: the template is broken or takes too much time or memory, or two answers give the same text.
    """
    texts = set()
    for answer in ANSWERS:
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        try:
            with template_limits(tokenizer.chat_template):
                texts.add(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        except BaseException as error:  # a template is a program, and may raise anything
            if is_interruption(error):
                raise
            if isinstance(error, TemplateError) and not isinstance(error, (TemplateSyntaxError, SecurityError)):
                return
            raise ValueError(f"The chat template of {owner} cannot be used: {named_error(error)}. Mend it.") from None
    if len(texts) == 1:
        raise ValueError(f"The chat template of {owner} leaves answers out: two of them give the same text. Mend it.")
