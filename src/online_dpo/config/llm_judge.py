"""Settings of a judge that is asked over HTTP. Imports nothing heavy, so that the command line can check them first."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from online_dpo.config.endpoints import (
    check_address,
    check_variable,
    in_own_network,
    read_key,
    secret_fields,
    shown_variable,
)
from online_dpo.config.hf_ranges import absurd

LLM = "llm"  # how run files name such a judge
OPENAI = "https://api.openai.com/v1"

Order = Literal["both", "random", "given"]
Inconsistent = Literal["soften", "skip", "revote"]
TEMPLATES = ("direct", "reasoned")

WHERE_KEYS_GO = "Put the key into an environment variable and name that in `api_key_env`."

AT_LEAST_ONE = (
    "votes",
    "revotes",
    "max_tokens",
    "concurrency",
    "attempts",
    "requests_per_minute",
    "tokens_per_minute",
)
ABOVE_ZERO = ("request_timeout", "question_timeout", "vote_temperature", "max_cost")
NOT_NEGATIVE = ("temperature", "input_price", "output_price")


@dataclass(frozen=True)
class JudgeSettings:
    """Settings of a :class:`online_dpo.scoring.LLMJudge`.

    >>> JudgeSettings(model="gpt-4.1-mini", rubric="Prefer the answer with fewer errors.", max_cost=5.0,
    ...     input_price=0.4, output_price=1.6)

    Raises:
        ValueError: a field has no sensible value, or contradicts another; the message says which.
    """

    model: str
    """Name of the judging model, as the endpoint knows it."""

    base_url: str = OPENAI
    """Address of an OpenAI-compatible endpoint, such as `http://localhost:8000/v1`."""

    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the API key. An endpoint in one's own network needs none."""

    # --- the question -----------------------------------------------------------------------------------------------

    template: str = "direct"
    """`direct` (answers with one letter), `reasoned` (thinks first, then gives its verdict), or a file that holds
    `{prompt}`, `{first}` and `{second}`, and `{rubric}` if there is one."""

    rubric: str | None = None
    """What makes an answer the better one, in words. When not set, a general one."""

    rubric_file: str | None = None
    """A file to read the rubric from."""

    order: Order = "both"
    """`both` asks twice, with each completion first once, and takes the mean, so that a judge's preference for a place
    cancels; `random` asks once, in an order that a hash of the texts decides; `given` asks once, in the order that they
    have.
    """

    inconsistent: Inconsistent = "soften"
    """What to do where the two orders have different winners: `soften` keeps their mean, `skip` gives no preference,
    `revote` asks again, up to `revotes` times in both orders, until they agree, and softens if they never do."""

    # --- the answer -------------------------------------------------------------------------------------------------

    logprobs: bool = True
    """Read the preference from the log-probabilities of the two verdict letters. Where the endpoint gives none, an
    answer is a vote."""

    votes: int = 1
    """Answers to take the mean of, in each order. An answer whose first token is the verdict, with log-probabilities,
    is not asked for twice."""

    revotes: int = 3
    """Most further rounds of `inconsistent: revote`."""

    temperature: float = 0.0
    """Sampling temperature of a single answer."""

    vote_temperature: float = 0.7
    """Sampling temperature where there are several votes."""

    max_tokens: int | None = None
    """Longest answer, in tokens. When not set, 8 for `direct` and 1024 otherwise."""

    extra: dict[str, Any] | None = None
    """Further fields of the request, such as `{seed: 0}`. A field that is null is left out of the request, such as
    `{max_tokens: null, max_completion_tokens: 2000}` for models that know only the other name."""

    # --- limits -----------------------------------------------------------------------------------------------------

    concurrency: int = 16
    """Most questions at the same time. Several processes share this, and the limits below."""

    requests_per_minute: int | None = None
    """Most requests in any 60 seconds."""

    tokens_per_minute: int | None = None
    """Most tokens, read and written, in any 60 seconds."""

    request_timeout: float = 60.0
    """Seconds that one request may take."""

    question_timeout: float = 300.0
    """Seconds that one question may take with all its retries. Waiting for a limit above does not count."""

    attempts: int = 8
    """Most requests for one question. Lost connections, time-outs and statuses 408, 409, 429 and from 500 up are tried
    again, after a pause that doubles, or as long as the endpoint asks for in `Retry-After`."""

    max_failure_share: float = 0.2
    """The run stops when more than this share of the last questions asked has no usable answer."""

    input_price: float = 0.0
    """Price of a million tokens read."""

    output_price: float = 0.0
    """Price of a million tokens written."""

    max_cost: float | None = None
    """The run stops before it has spent more, in the currency of the prices. A resumed run begins to count anew."""

    # --- the cache --------------------------------------------------------------------------------------------------

    cache: str | None = "~/.cache/online-dpo/judge.sqlite3"
    """File that keeps answers, on a local disk; several runs may share it. Null: they are kept in memory only."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("`model` is empty: name the judging model as the endpoint knows it.")
        for name, choices in (("order", get_args(Order)), ("inconsistent", get_args(Inconsistent))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}; it is {getattr(self, name)!r}.")
        self._check_numbers()
        self._check_address()
        if self.inconsistent != "soften" and self.order != "both":
            raise ValueError(f"`inconsistent: {self.inconsistent}` needs both orders, but `order` is {self.order!r}.")
        if self.max_cost is not None and not (self.input_price or self.output_price):
            raise ValueError("`max_cost` needs `input_price` and `output_price`, per million tokens.")
        if self.rubric is not None and self.rubric_file is not None:
            raise ValueError("Give `rubric` or `rubric_file`, not both.")
        for name in ("rubric_file", "template"):
            value = getattr(self, name)
            if value is not None and value not in TEMPLATES and not Path(value).expanduser().is_file():
                choices = f"one of {', '.join(TEMPLATES)}, or a file" if name == "template" else "a file"
                raise ValueError(f"`{name}` must be {choices}; there is no file {value!r}.")

    def _check_numbers(self) -> None:
        for name, problem in absurd(vars(self)):
            raise ValueError(f"`{name}` {problem}")
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be 1 or more; it is {value}.")
        for names, lowest in ((ABOVE_ZERO, "above 0"), (NOT_NEGATIVE, "0 or more")):
            for name in names:
                value = getattr(self, name)
                if value is None:  # no limit
                    continue
                if not math.isfinite(value) or value < 0 or (value == 0 and names is ABOVE_ZERO):
                    raise ValueError(f"`{name}` must be {lowest}; it is {value}.")
        if not 0 <= self.max_failure_share <= 1:
            raise ValueError(f"`max_failure_share` must be between 0 and 1; it is {self.max_failure_share}.")

    def _check_address(self) -> None:
        parts = check_address(self.base_url, "`base_url`", WHERE_KEYS_GO)
        if parts.query or parts.fragment:
            raise ValueError(f"`base_url` holds a query, which is no part of an endpoint's address. {WHERE_KEYS_GO}")
        check_variable(self.api_key_env, "api_key_env")
        if names := secret_fields(self.extra or {}):
            raise ValueError(f"`extra` holds {', '.join(f'`{name}`' for name in names)}. {WHERE_KEYS_GO}")

    def check_environment(self) -> None:
        """Check that the judge can be asked from here.

        Raises:
            ValueError: there is no API key for an endpoint outside one's own network, the key cannot be sent, or a
                package is missing.
        """
        if read_key(self.api_key_env) is None and not self.is_local:
            raise ValueError(
                f"There is no API key for {self.base_url}: set {shown_variable(self.api_key_env)}, or name another one "
                "in `api_key_env`."
            )
        if any(importlib.util.find_spec(package) is None for package in ("openai", "tenacity")):
            raise ValueError("A judge over HTTP needs openai and tenacity: pip install 'online-dpo[judge]'")

    @property
    def is_local(self) -> bool:
        """Whether the endpoint stands on this machine or in one's own network."""
        return in_own_network(self.base_url)

    def share_of(self, processes: int) -> JudgeSettings:
        """The settings with one process's share of the limits, so that all processes together keep to them. Each may
        ask one question at a time, however many they are.

        Raises:
            ValueError: a limit cannot be divided among so many.
        """
        shares: dict[str, Any] = {"concurrency": max(self.concurrency // processes, 1)}
        for name in ("requests_per_minute", "tokens_per_minute"):
            limit = getattr(self, name)
            if limit is not None and limit < processes:
                raise ValueError(f"`{name}` is {limit}, which {processes} processes cannot share. Raise it.")
            shares[name] = None if limit is None else limit // processes
        return replace(self, **shares, max_cost=None if self.max_cost is None else self.max_cost / processes)

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """What a request of so many tokens costs."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6
