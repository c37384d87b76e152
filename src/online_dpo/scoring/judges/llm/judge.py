"""A language model as a judge, asked over HTTP: both orders, votes, and one probability for each comparison."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from online_dpo.config.llm_judge import JudgeSettings
from online_dpo.distributed.collectives import world_size
from online_dpo.errors import FeedbackStopped
from online_dpo.scoring.accounting import FailureWindow, Tally
from online_dpo.scoring.event_loop import submit, wait_for
from online_dpo.scoring.judges.base import PreferenceJudge
from online_dpo.scoring.judges.llm.cache import Answer, AnswerCache, cache_key
from online_dpo.scoring.judges.llm.client import ChatEndpoint, QuestionFailed
from online_dpo.scoring.judges.llm.prompts import GENERAL_RUBRIC, Verdict, load_template, prompt_text, read_verdict
from online_dpo.scoring.judges.llm.rate_limit import Budget, RateLimiter
from online_dpo.scoring.protocols import Counts, check_comparisons
from online_dpo.types import Group

T = TypeVar("T")

COUNTS = ("requests", "cached", "failed", "unparsable", "input_tokens", "output_tokens", "cost", "seconds")


class LLMJudge(PreferenceJudge):
    """Asks a model behind an OpenAI-compatible endpoint which of two completions is better.

    >>> LLMJudge(model="Qwen/Qwen3-8B", base_url="http://localhost:8000/v1", rubric="Prefer the shorter answer.")

    Usable from any thread, and by several at once: they share the limits, and nothing is asked twice at the same time.
    Answers are kept in a cache, those without a verdict as well; failures are not.

    Args:
        settings: those of :class:`JudgeSettings`.

    Raises:
        ValueError: a setting is wrong, a template or rubric cannot be used, the cache cannot be opened, there is no
            API key for an endpoint outside one's own network, or a package is missing.
        TypeError: there is no such setting.
        FeedbackStopped: (when judging) too many questions fail, the endpoint refuses the key or the model, or the next
            question could cost more than is left.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = JudgeSettings(**settings)
        self.name = self.settings.model.rstrip("/").split("/")[-1]
        self.settings.check_environment()
        self._rubric = _rubric(self.settings)
        self._template = load_template(self.settings.template, has_rubric=self._rubric != GENERAL_RUBRIC)
        self._max_tokens = self.settings.max_tokens or self._template.max_tokens
        self._cache = AnswerCache(self.settings.cache)
        self._tally = Tally(COUNTS)
        self._failures = FailureWindow(f"Judge `{self.name}`", self.settings.max_failure_share)
        self._endpoint: ChatEndpoint | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._begun: set[asyncio.Future[Answer | None]] = set()

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """For each group of two, the probability that its first completion is the better one.

        ``None`` where an order has no usable answer, or where the orders contradict each other and
        ``inconsistent`` is "skip". Equal texts give 0.5 and are not asked about.
        """
        check_comparisons(comparisons)
        texts = [
            (prompt_text(comparison.prompt), *(completion.text for completion in comparison.completions))
            for comparison in comparisons
        ]
        distinct = list(dict.fromkeys(texts))
        started = time.perf_counter()
        try:
            answers = wait_for(submit(_together(self._comparison(*text) for text in distinct)))
        except FeedbackStopped:
            wait_for(submit(self._let_finish()))
            raise
        finally:
            self._tally.add("seconds", time.perf_counter() - started)
        preferences = dict(zip(distinct, answers, strict=True))
        return [preferences[text] for text in texts]

    @property
    def last_failure(self) -> str:
        """Why a question had no usable answer, the last time that one had none; empty if all had one."""
        return self._failures.last_cause

    def metrics(self) -> dict[str, float]:
        """What was counted since the last call. ``judge/position_bias`` is the mean probability that the completion
        which stood first was given, 0.5 for a fair judge asked in both orders; ``judge/disagreement_rate`` the share of
        comparisons whose orders had different winners. Both count cached answers as well; requests, tokens and cost do
        not.
        """
        return self.drain().metrics()

    def drain(self) -> Counts:
        """The same, with rates as part and whole, so that they can be added up."""
        return self._tally.drain()

    async def _comparison(self, prompt: str, first: str, second: str) -> float | None:
        if first == second:
            return 0.5
        turned = self._orders(prompt, first, second)
        temperature = self.settings.temperature if self.settings.votes == 1 else self.settings.vote_temperature
        numbers = range(self.settings.votes)
        votes = await _together(
            self._votes(prompt, *_presented(first, second, turn), numbers, temperature) for turn in turned
        )
        if not all(votes):
            return None
        for order in votes:
            self._tally.order(_mean(order))
        preferences = _preferences(votes, turned)
        if len(turned) == 2:
            self._tally.add("both_orders")
            self._tally.add("disagreed", _contradict(preferences))
        if _contradict(preferences) and self.settings.inconsistent == "skip":
            return None
        if _contradict(preferences) and self.settings.inconsistent == "revote":
            preferences = await self._revote(prompt, first, second, votes)
        return sum(preferences) / len(preferences)

    async def _revote(self, prompt: str, first: str, second: str, votes: list[list[Verdict]]) -> list[float]:
        """Preferences by order, after further votes until the orders agree. ``votes`` gets longer."""
        turned = [False, True]
        if all(vote.final for order in votes for vote in order):  # further votes would be the same
            return _preferences(votes, turned)
        for number in range(self.settings.votes, self.settings.votes + self.settings.revotes):
            if _agree(_preferences(votes, turned)):
                break
            further = await _together(
                self._votes(
                    prompt, *_presented(first, second, turn), range(number, number + 1), self.settings.vote_temperature
                )
                for turn in turned
            )
            for order, new in zip(votes, further, strict=True):
                order += new
        return _preferences(votes, turned)

    def _orders(self, prompt: str, first: str, second: str) -> list[bool]:
        """Whether the second completion is presented first, for each time that the comparison is judged."""
        if self.settings.order == "both":
            return [False, True]
        return [self.settings.order == "random" and not stands_first(prompt, first, second)]

    async def _votes(
        self, prompt: str, first: str, second: str, numbers: Sequence[int], temperature: float
    ) -> list[Verdict]:
        """What comes of asking once for each number, in this order; answers that are missing are left out."""
        verdict = await self._ask(prompt, first, second, numbers[0], temperature)
        if verdict is not None and verdict.final:
            return [verdict]
        others = await _together(self._ask(prompt, first, second, number, temperature) for number in numbers[1:])
        return [one for one in (verdict, *others) if one is not None]

    async def _ask(self, prompt: str, first: str, second: str, number: int, temperature: float) -> Verdict | None:
        settings = self.settings
        sampling = {
            "temperature": temperature,
            "max_tokens": self._max_tokens,
            "logprobs": settings.logprobs,
            "extra": settings.extra or {},
        }
        template, rubric = self._template, self._rubric
        key = cache_key(template.text, rubric, settings.model, sampling, prompt, first, second, number)
        async with self._asking.setdefault(key, asyncio.Lock()):
            answer = await asyncio.to_thread(self._cache.get, key)
            if answer is not None:
                self._tally.add("cached")
            else:
                async with self._connected().slots:
                    asking = asyncio.ensure_future(
                        self._ask_and_keep(key, template.fill(rubric, prompt, first, second), temperature)
                    )
                    self._begun.add(asking)
                    asking.add_done_callback(self._begun.discard)
                    answer = await asyncio.shield(asking)
        if answer is None:
            return None
        if answer.p_first is None:
            self._tally.add("unparsable")
            return None
        return Verdict(answer.p_first, answer.final)

    async def _ask_and_keep(self, key: str, question: str, temperature: float) -> Answer | None:
        answer = await self._fresh(question, temperature)
        if answer is not None:
            await asyncio.to_thread(self._cache.put, key, self.settings.model, answer)
            self._failures.add(f"no verdict in {answer.reply[:80]!r}" if answer.p_first is None else None)
        return answer

    async def _let_finish(self) -> None:
        """Questions that were on their way when another one stopped the judge are paid for: keep their answers."""
        if not self._begun:
            return
        done, late = await asyncio.wait(self._begun, timeout=self.settings.request_timeout)
        for task in late:
            task.cancel()
        await asyncio.gather(*done, *late, return_exceptions=True)

    async def _fresh(self, question: str, temperature: float) -> Answer | None:
        try:
            reply = await self._connected().ask(question, self._max_tokens, temperature)
        except QuestionFailed as error:
            cause = str(error)
        else:
            verdict = read_verdict(reply.text, reply.choices if self.settings.logprobs else [])
            p_first, final = (None, False) if verdict is None else (verdict.p_first, verdict.final)
            return Answer(p_first, final, reply.text, reply.input_tokens, reply.output_tokens)
        self._tally.add("failed")
        self._failures.add(cause)
        return None

    def _connected(self) -> ChatEndpoint:
        """The endpoint, with limits and connections that belong to the running loop: a forked process has another."""
        loop = asyncio.get_running_loop()
        if self._endpoint is None or self._loop is not loop:
            share = self.settings.share_of(world_size())
            limiter = RateLimiter(share.requests_per_minute, share.tokens_per_minute)
            self._endpoint = ChatEndpoint(share, limiter, Budget(share.max_cost), self._tally)
            self._loop = loop
        return self._endpoint


def check_share(judge: Any, processes: int) -> None:
    """
    Raises:
        ValueError: ``judge`` is a language model, and so many processes cannot share its limits.
    """
    if isinstance(judge, LLMJudge):
        judge.settings.share_of(processes)


def stands_first(prompt: str, one: str, other: str) -> bool:
    """Whether ``one`` goes before ``other`` in an order that looks random, but depends on the texts only.

    ``stands_first(p, a, b)`` is never ``stands_first(p, b, a)`` for two texts.
    """
    return _digest(prompt, one) <= _digest(prompt, other)


def _digest(prompt: str, text: str) -> bytes:
    return hashlib.sha256(f"{len(prompt)}:{prompt}{text}".encode()).digest()


def _presented(first: str, second: str, turned: bool) -> tuple[str, str]:
    return (second, first) if turned else (first, second)


def _mean(votes: Sequence[Verdict]) -> float:
    return sum(vote.p_first for vote in votes) / len(votes)


def _preferences(votes: Sequence[Sequence[Verdict]], turned: Sequence[bool]) -> list[float]:
    """The probability that the duel's first completion is better, by order."""
    return [1 - _mean(order) if turn else _mean(order) for order, turn in zip(votes, turned, strict=True)]


def _contradict(preferences: Sequence[float]) -> bool:
    return min(preferences) < 0.5 < max(preferences)


def _agree(preferences: Sequence[float]) -> bool:
    return min(preferences) > 0.5 or max(preferences) < 0.5


async def _together(coroutines: Iterable[Awaitable[T]]) -> list[T]:
    """All results. The first failure, or an interruption, ends the others too."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _rubric(settings: JudgeSettings) -> str:
    if settings.rubric_file is not None:
        rubric = Path(settings.rubric_file).expanduser().read_text(encoding="utf-8").strip()
        if not rubric:
            raise ValueError(f"`rubric_file`: {settings.rubric_file} is empty. Write what makes an answer better.")
        return rubric
    return settings.rubric or GENERAL_RUBRIC
