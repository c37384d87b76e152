"""A language model as a judge, asked over HTTP: it combines both orders and several votes into one probability."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from online_dpo.config.llm_judge import JudgeSettings
from online_dpo.distributed.collectives import world_size
from online_dpo.errors import FeedbackStopped
from online_dpo.scoring.accounting import FailureWindow, JudgeStatistics
from online_dpo.scoring.event_loop import submit, wait_for
from online_dpo.scoring.judges.base import PreferenceJudge
from online_dpo.scoring.judges.llm.cache import Answer, AnswerCache, cache_key
from online_dpo.scoring.judges.llm.client import ChatEndpoint, QuestionFailed
from online_dpo.scoring.judges.llm.prompts import GENERAL_RUBRIC, Verdict, load_template, prompt_text, read_verdict
from online_dpo.scoring.judges.llm.rate_limit import Budget, RateLimiter
from online_dpo.scoring.protocols import Counts, check_comparisons
from online_dpo.scoring.questions import keep_questions
from online_dpo.scoring.service import gather
from online_dpo.scoring.special_tokens import without_chat_marks
from online_dpo.types import Group, Question

COUNTS = ("requests", "cached", "failed", "unparsable", "input_tokens", "output_tokens", "cost", "seconds")
NO_VERDICT = "there is no verdict in the answer"


@dataclass(frozen=True)
class _Shown:
    """A comparison in one order. ``asked`` gains its questions, by the number of the vote."""

    prompt: str
    first: str
    second: str
    swapped: bool
    asked: dict[int, Question] = field(default_factory=dict)

    @property
    def questions(self) -> list[Question]:
        """The questions, whatever order their answers came in."""
        return [self.asked[number] for number in sorted(self.asked)]


class LLMJudge(PreferenceJudge):
    """A judge that asks a language model behind an OpenAI-compatible endpoint which of two completions is better.

    >>> LLMJudge(model="Qwen/Qwen3-8B", base_url="http://localhost:8000/v1", rubric="Prefer the shorter answer.")

    Several threads may use it at the same time. They share the limits, and the same question is never asked twice at
    the same time. Replies are cached, also those without a verdict; failures are not.

    Args:
        settings: the fields of :class:`JudgeSettings`.

    Raises:
        ValueError: a setting is wrong, a template or rubric cannot be used, the cache cannot be opened, there is no
            API key for an endpoint outside the user's own network, or a package is missing.
        TypeError: a setting does not exist.
        FeedbackStopped: (when judging) too many questions fail, the endpoint refuses the key or the model, or the next
            question could cost more than is left of the budget.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = JudgeSettings(**settings)
        self.name = self.settings.model.rstrip("/").split("/")[-1]
        self.settings.check_environment()
        self._rubric = _rubric(self.settings)
        self._template = load_template(self.settings.template, has_rubric=self._rubric != GENERAL_RUBRIC)
        self._max_tokens = self.settings.max_tokens or self._template.max_tokens
        self._cache = AnswerCache(self.settings.cache)
        self._statistics = JudgeStatistics(COUNTS)
        self._failures = FailureWindow(f"Judge `{self.name}`", self.settings.max_failure_share)
        self._endpoint: ChatEndpoint | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._question_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._in_flight: set[asyncio.Future[Answer | str]] = set()

    def prefer(self, comparisons: Sequence[Group]) -> list[float | None]:
        """Return for each group of two completions the probability that the first one is better.

        ``None`` if one of the orders has no usable answer, or if the orders contradict each other and ``inconsistent``
        is "skip". Equal texts give 0.5 without a question.
        """
        check_comparisons(comparisons)
        texts = [
            (prompt_text(comparison.prompt), *(completion.text for completion in comparison.completions))
            for comparison in comparisons
        ]
        distinct = list(dict.fromkeys(texts))
        started = time.perf_counter()
        try:
            answers = wait_for(submit(gather(self._compare(*text) for text in distinct)))
        except FeedbackStopped:
            wait_for(submit(self._finish_in_flight()))
            raise
        finally:
            self._statistics.add("seconds", time.perf_counter() - started)
        preferences = dict(zip(distinct, answers, strict=True))
        return [preferences[text] for text in texts]

    def identity(self) -> dict[str, Any]:
        """Returns the settings that change answers; not where the model is served, nor how fast or dear it is."""
        settings = self.settings
        names = ("model", "order", "inconsistent", "logprobs", "votes", "revotes", "temperature", "vote_temperature")
        of_answers = {name: getattr(settings, name) for name in (*names, "max_tokens", "template", "extra")}
        return {**of_answers, "rubric": self._rubric}

    @property
    def is_fair(self) -> bool:
        """Whether position bias cancels: the texts are shown in both orders, or in an order that looks random."""
        return self.settings.order != "given"

    @property
    def last_failure(self) -> str:
        """The latest cause of a missing answer, empty if there was none."""
        return self._failures.last_cause

    def metrics(self) -> dict[str, float]:
        """Return the metrics since the last call, and reset them.

        ``judge/position_bias`` is the mean probability given to the completion that was shown first, 0.5 for a fair
        judge asked in both orders. ``judge/disagreement_rate`` is the share of comparisons in which the two orders had
        different winners. Both include cached answers; requests, tokens and cost do not.
        """
        return self.drain().metrics()

    def drain(self) -> Counts:
        """Return the same counts with each rate as (part, whole), so that processes can add them up."""
        return self._statistics.drain()

    async def _compare(self, prompt: str, first: str, second: str) -> float | None:
        """The probability that ``first`` is better: the mean over all orders of the mean over votes."""
        if first == second:
            return 0.5
        orders = [
            _Shown(prompt, *_presented(first, second, swap), swap) for swap in self._orders(prompt, first, second)
        ]
        try:
            return await self._preference(orders)
        finally:
            keep_questions((prompt, first, second), [question for order in orders for question in order.questions])

    async def _preference(self, orders: list[_Shown]) -> float | None:
        temperature = self.settings.temperature if self.settings.votes == 1 else self.settings.vote_temperature
        vote_numbers = range(self.settings.votes)
        votes = await gather(self._collect_votes(order, vote_numbers, temperature) for order in orders)
        if not all(votes):
            return None
        for order in votes:
            self._statistics.add_answer(_mean(order))
        preferences = _preferences(votes, orders)
        if len(orders) == 2:
            self._statistics.add("both_orders")
            self._statistics.add("disagreed", _contradict(preferences))
        if _contradict(preferences) and self.settings.inconsistent == "skip":
            return None
        if _contradict(preferences) and self.settings.inconsistent == "revote":
            preferences = await self._revote(orders, votes)
        return sum(preferences) / len(preferences)

    async def _revote(self, orders: list[_Shown], votes: list[list[Verdict]]) -> list[float]:
        """The preferences of both orders after more votes, which are added to ``votes`` until the orders agree."""
        if all(vote.final for order in votes for vote in order):  # more votes would be the same
            return _preferences(votes, orders)
        for number in range(self.settings.votes, self.settings.votes + self.settings.revotes):
            if _agree(_preferences(votes, orders)):
                break
            new_votes = await gather(
                self._collect_votes(order, range(number, number + 1), self.settings.vote_temperature)
                for order in orders
            )
            for order, new in zip(votes, new_votes, strict=True):
                order += new
        return _preferences(votes, orders)

    def _orders(self, prompt: str, first: str, second: str) -> list[bool]:
        """The orders in which the texts are shown, as whether the second text comes first."""
        if self.settings.order == "both":
            return [False, True]
        return [self.settings.order == "random" and not stands_first(prompt, first, second)]

    async def _collect_votes(self, order: _Shown, numbers: Sequence[int], temperature: float) -> list[Verdict]:
        """Ask once for each vote number, with the texts in this order. Missing answers are left out."""
        verdict = await self._vote(order, numbers[0], temperature)
        if verdict is not None and verdict.final:
            return [verdict]
        others = await gather(self._vote(order, number, temperature) for number in numbers[1:])
        return [vote for vote in (verdict, *others) if vote is not None]

    async def _vote(self, order: _Shown, number: int, temperature: float) -> Verdict | None:
        """One verdict, from the cache or from the endpoint; ``None`` without a usable answer."""
        settings = self.settings
        sampling = {
            "temperature": temperature,
            "max_tokens": self._max_tokens,
            "logprobs": settings.logprobs,
            "extra": settings.extra or {},
        }
        template, rubric, texts = self._template, self._rubric, (order.prompt, order.first, order.second)
        key = cache_key(template.text, rubric, settings.model, sampling, *texts, number)
        seconds = None
        async with self._question_locks.setdefault(key, asyncio.Lock()):
            answer = await asyncio.to_thread(self._cache.get, key)
            if answer is not None:
                self._statistics.add("cached")
            else:
                async with self._connected().slots:
                    started = time.perf_counter()
                    shown = (order.prompt, without_chat_marks(order.first), without_chat_marks(order.second))
                    question = template.fill(rubric, *shown)
                    answer = await self._shielded(self._ask_and_cache(key, question, temperature))
                    seconds = time.perf_counter() - started
        order.asked[number] = self._question(order.swapped, answer, seconds)
        if isinstance(answer, str):
            return None
        if answer.p_first is None:
            self._statistics.add("unparsable")
            return None
        return Verdict(answer.p_first, answer.final)

    def _question(self, swapped: bool, answer: Answer | str, seconds: float | None) -> Question:
        """What the record of the run says of a question. One that the cache has answered, without ``seconds``, used
        nothing.
        """
        if isinstance(answer, str):
            return Question(swapped, None, seconds=seconds, failure=answer)
        failure = NO_VERDICT if answer.p_first is None else None
        if seconds is None:
            return Question(swapped, answer.p_first, answer.reply, failure=failure, cached=True)
        tokens, cost = (
            answer.input_tokens + answer.output_tokens,
            self.settings.cost(answer.input_tokens, answer.output_tokens),
        )
        return Question(swapped, answer.p_first, answer.reply, seconds, tokens, cost or None, failure)

    async def _shielded(self, question: Coroutine[Any, Any, Answer | str]) -> Answer | str:
        """The answer to a question that goes on when this one is cancelled (see `_finish_in_flight`)."""
        task = asyncio.ensure_future(question)
        self._in_flight.add(task)
        task.add_done_callback(self._landed)
        return await asyncio.shield(task)

    def _landed(self, task: asyncio.Future[Answer | str]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: asyncio prints the traceback of an error that nobody waits for any more

    async def _ask_and_cache(self, key: str, question: str, temperature: float) -> Answer | str:
        answer = await self._ask(question, temperature)
        if isinstance(answer, Answer):
            await asyncio.to_thread(self._cache.put, key, self.settings.model, answer)
            self._failures.add(f"no verdict in {answer.reply[:80]!r}" if answer.p_first is None else None)
        return answer

    async def _finish_in_flight(self) -> None:
        """Wait for questions that were already sent when another one stopped the judge: their answers are paid for."""
        if not self._in_flight:
            return
        done, late = await asyncio.wait(self._in_flight, timeout=self.settings.request_timeout)
        for task in late:
            task.cancel()
        await asyncio.gather(*done, *late, return_exceptions=True)

    async def _ask(self, question: str, temperature: float) -> Answer | str:
        """Ask the endpoint and read the verdict; the cause (and a counted failure) without a reply."""
        try:
            reply = await self._connected().ask(question, self._max_tokens, temperature)
        except QuestionFailed as error:
            cause = str(error)
        else:
            verdict = read_verdict(reply.text, reply.choices if self.settings.logprobs else [])
            p_first, final = (None, False) if verdict is None else (verdict.p_first, verdict.final)
            return Answer(p_first, final, reply.text, reply.input_tokens, reply.output_tokens)
        self._statistics.add("failed")
        self._failures.add(cause)
        return cause

    def _connected(self) -> ChatEndpoint:
        """The endpoint of the running event loop, created on first use: a forked process has another loop, and limits
        and connections belong to one loop."""
        loop = asyncio.get_running_loop()
        if self._endpoint is None or self._loop is not loop:
            share = self.settings.share_of(world_size())
            limiter = RateLimiter(share.requests_per_minute, share.tokens_per_minute)
            self._endpoint = ChatEndpoint(share, limiter, Budget(share.max_cost), self._statistics)
            self._loop = loop
        return self._endpoint


def check_share(judge: Any, processes: int) -> None:
    """Check that each process of a run gets a share of a judge's limits. Only language models have limits.

    Raises:
        ValueError: the limits are too small for so many processes.
    """
    if isinstance(judge, LLMJudge):
        judge.settings.share_of(processes)


def stands_first(prompt: str, one: str, other: str) -> bool:
    """Whether ``one`` is shown before ``other``, in an order that looks random but depends only on the texts.

    For two different texts, ``stands_first(p, a, b)`` is the opposite of ``stands_first(p, b, a)``.
    """
    return _digest(prompt, one) <= _digest(prompt, other)


def _digest(prompt: str, text: str) -> bytes:
    return hashlib.sha256(f"{len(prompt)}:{prompt}{text}".encode("utf-8", "surrogatepass")).digest()


def _presented(first: str, second: str, swapped: bool) -> tuple[str, str]:
    return (second, first) if swapped else (first, second)


def _mean(votes: Sequence[Verdict]) -> float:
    return sum(vote.p_first for vote in votes) / len(votes)


def _preferences(votes: Sequence[Sequence[Verdict]], orders: Sequence[_Shown]) -> list[float]:
    """For each order, the probability that the comparison's first completion is better."""
    return [1 - _mean(given) if order.swapped else _mean(given) for given, order in zip(votes, orders, strict=True)]


def _contradict(preferences: Sequence[float]) -> bool:
    return min(preferences) < 0.5 < max(preferences)


def _agree(preferences: Sequence[float]) -> bool:
    return min(preferences) > 0.5 or max(preferences) < 0.5


def _rubric(settings: JudgeSettings) -> str:
    if settings.rubric_file is not None:
        rubric = Path(settings.rubric_file).expanduser().read_text(encoding="utf-8").strip()
        if not rubric:
            raise ValueError(f"`rubric_file`: {settings.rubric_file} is empty. Write what makes an answer better.")
        return rubric
    return settings.rubric or GENERAL_RUBRIC
