"""From what a user passes as ``judge`` (a function, an object, a path) to a pairwise scorer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from online_dpo.config.feedback import HUMAN
from online_dpo.config.llm_judge import LLM
from online_dpo.config.registry import Registry, RegistryError, made_once, nearest
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.modeling.loading import check_model_path
from online_dpo.scoring.judges.adapters import FunctionJudge, JudgeScorer, form_of, takes, takes_lists
from online_dpo.scoring.judges.base import Judge
from online_dpo.scoring.judges.human import HumanJudge
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.scoring.protocols import PairwiseScorer

JUDGES: Registry[Callable[[], Any]] = Registry("judge")

Decorated = TypeVar("Decorated")


def judge(name: str) -> Callable[[Decorated], Decorated]:
    """Register a judge of any form that a trainer accepts, so that ``judge="name"`` selects it in Python and in run
    files.

    A class is instantiated without arguments when it is first used.

    >>> @judge("longer")
    ... def longer(prompt, first, second): return float(len(first) > len(second))

    Raises:
        RegistryError: the name is taken.
    """
    if name == LLM:
        raise RegistryError(f"a judge cannot be named `{LLM}`: that means a language model. Take another name.")
    if name == HUMAN:
        raise RegistryError(f"a judge cannot be named `{HUMAN}`: that means people. Take another name.")
    return JUDGES.decorator(name, made_once)


def registered_judge(judge: Any) -> Any:
    """The judge that is registered under a name; anything else is returned unchanged."""
    return JUDGES[judge]() if isinstance(judge, str) and judge in JUDGES else judge


def check_judge(judge: Any, argument: str) -> None:
    """Check what a user passed as a judge, before any model is loaded. ``argument`` is its name in messages.

    Raises:
        TypeError: ``judge`` is neither a path nor of a form that :func:`pairwise_scorer` accepts.
        ValueError: the folder does not exist, or it is the name of a judge that needs settings.
    """
    judge = registered_judge(judge)
    if judge == LLM:
        raise ValueError(f"A language model as `{argument}` needs settings: give `LLMJudge(model=..., ...)`.")
    if judge == HUMAN:
        return
    if isinstance(judge, str):
        if judge.startswith(("http://", "https://")):
            raise ValueError(
                f"A path as `{argument}` is a pairwise model's folder or hub name, not an address of HTTP. For a "
                "language model behind an endpoint, give `LLMJudge(model=..., base_url=address)`."
            )
        if not os.path.exists(os.path.expanduser(judge)) and nearest(judge, JUDGES):
            raise ValueError(f"`{argument}`: there is no folder {judge!r}, and {JUDGES.unknown(judge)}")
        check_model_path(judge, argument, "judge")
        return
    known = isinstance(judge, (Judge, PairwiseScorer))
    if not known and not (callable(judge) and (takes_lists(judge) or takes(judge, "prompt", "first", "second"))):
        raise TypeError(
            f"`{argument}` must have `name` and `prefer(comparisons)`, or a method `judge(prompts, completion_pairs, "
            "shuffle_order)`, or be a function of that form or of the form f(prompt, first, second), or the path of a "
            f"pairwise model; this is {form_of(judge)}."
        )


def pairwise_scorer(
    judge: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_failure_share: float = 0.2,
) -> PairwiseScorer:
    """Turn what a user passed as ``judge`` into a pairwise scorer.

    A pairwise scorer is returned as it is. A judge in TRL's form becomes a :class:`JudgeScorer`, any other function a
    :class:`FunctionJudge`. A function has TRL's form if it accepts ``shuffle_order``.

    Raises:
        TypeError: ``judge`` has none of these forms.
    """
    judge = registered_judge(judge)
    check_judge(judge, "judge")
    if judge == HUMAN:
        raise TypeError("People as judge need a folder: give `HumanJudge(folder)`.")
    if isinstance(judge, PairwiseScorer):
        return judge
    if isinstance(judge, Judge) or takes_lists(judge):
        return JudgeScorer(judge, tokenizer, chat_template_kwargs)
    return FunctionJudge(judge, max_failure_share=max_failure_share)


def build_judge(judge: Any, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> PairwiseScorer:
    """Build the pairwise scorer of a run. ``"human"`` asks people; another string is the path or hub name of a pairwise
    model, which is loaded and moved to ``args.device``; everything else is converted by :func:`pairwise_scorer`.

    Raises:
        TypeError, ValueError, OSError: see :func:`check_judge` and :meth:`PairwiseModelJudge.load`.
    """
    judge = registered_judge(judge)
    check_judge(judge, "judge")
    if judge == HUMAN:
        return HumanJudge.from_config(args)
    if isinstance(judge, str):
        return PairwiseModelJudge.load(judge, args.device, max_failure_share=args.max_failure_share)
    kwargs: Any = args.chat_template_kwargs
    return pairwise_scorer(judge, tokenizer, kwargs, args.max_failure_share)
