"""Rewards and judges behind HTTP that fail, lie, are hostile or do not answer; their settings; the judge's cache."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

from faults.damage import Change, written
from faults.harness import ANY, SECRET, Ending, Fault, OneLine, Resumes, Service, Survived
from faults.services import (
    ANSWERS,
    KEY,
    REFUSALS,
    Respond,
    after,
    always,
    number_for_each,
    once,
    prefers,
    scores,
)
from support.endpoint import Answer, error, says

MANY = {"per_device_train_batch_size": 8}
"""So many questions a step that the share of failures stops the run at once."""
STOPS = ("gave no usable answer", "Last cause")
PART = ("500", "HTML", "nothing", "401", "a redirect to another host")
"""Answers that the quick list has in a later step as well."""
ALIKE = ("429", "403", "400", "422", "a JSON list", "a number", "no gzip, but says so", "no bytes", "204")
"""Answers that the quick list leaves out."""
SETTINGS = dict(model="m", base_url="{url}", api_key_env="SERVICE_KEY", cache=None, attempts=1, order="given")
LIMITS = dict(request_timeout=2.0, question_timeout=6.0)


def reward_file(address: str = "{url}", **settings: Any) -> dict[str, str | bytes]:
    """A feedback.py whose `words` asks a service."""
    words = "".join(f", {name}={value!r}" for name, value in ({"attempts": 1, "timeout": 2.0} | settings).items())
    made = f'words = HTTPReward("{address}", "words", api_key_env="SERVICE_KEY"{words})\n'
    return {"feedback.py": "from online_dpo.scoring import HTTPReward\n" + made}


def rewarded(
    name: str, faulty: Respond, ending: Ending, quick: bool = True, settings: Any = None, **options: Any
) -> Fault:
    return Fault(
        "reward service",
        name,
        ending,
        options=options,
        files=reward_file(**(settings or {})),
        environment=KEY,
        service=Service(faulty, scores),
        quick=quick,
    )


def judged(
    name: str, faulty: Respond, ending: Ending, quick: bool = True, settings: Any = None, **options: Any
) -> Fault:
    kwargs = SETTINGS | LIMITS | (settings or {})
    return Fault(
        "judge service",
        name,
        ending,
        options=dict(reward_funcs=None, judge="llm", judge_kwargs=kwargs) | options,
        environment=KEY,
        service=Service(faulty, prefers),
        quick=quick,
    )


def numbers(name: str, number: str, *words: str) -> Fault:
    words = words or ("a finite number",)
    return rewarded(f"gives {name}", number_for_each(number), OneLine(1, *STOPS, *words), **MANY)


def shapes(name: str, body: Any, *words: str) -> Fault:
    return rewarded(f"gives {name}", always(Answer(body)), OneLine(1, *STOPS, *words), **MANY)


def verdict(name: str, text: str, *words: str) -> Fault:
    return judged(f"says {name}", always(says(text)), OneLine(1, *STOPS, *words), **MANY)


def completion(name: str, *words: str, **changes: Any) -> Fault:
    """A chat completion whose form is another one."""
    return judged(f"answers {name}", always(Answer({**says("A").body, **changes})), OneLine(1, *STOPS, *words), **MANY)


def messages(content: Any) -> list[dict[str, Any]]:
    return [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]


REWARDS = [
    *(
        rewarded(f"answers {name}", always(answer), OneLine(1, *STOPS, reward), quick=name not in ALIKE, **MANY)
        for name, (answer, reward, _) in ANSWERS.items()
    ),
    *(
        rewarded(
            f"answers {name} in step 3",
            after(2, scores, always(answer)),
            Survived(like=ANY),
            quick=name in PART,
        )
        for name, (answer, _, _) in ANSWERS.items()
    ),
    *(
        rewarded(
            f"refuses with {name} in step 3",
            after(2, scores, always(answer)),
            Resumes(OneLine(1, "`words`", "checkpoint-2")),
            quick=name in PART,
        )
        for name, answer in REFUSALS.items()
    ),
    numbers("10**400", "1" + "0" * 400),
    numbers("a number of 5000 digits", "1" * 5000, "no JSON"),
    numbers("1e999", "1e999"),
    numbers("NaN", "NaN"),
    numbers("-Infinity", "-Infinity"),
    numbers("true", "true"),
    numbers("texts", '"1.0"'),
    numbers("lists", "[1.0]"),
    numbers("objects", '{"score": 1}'),
    shapes("too few scores", {"scores": [1.0]}, "1 scores for"),
    shapes("no scores", {"score": 1}),
    shapes("an object of scores", {"scores": {"0": 1.0}}),
    shapes("a number in place of scores", {"scores": 1.0}),
    rewarded("gives null", number_for_each("null"), OneLine(3, "missing_score")),
    *(
        rewarded(f"answers {name} once", once(scores, always(answer)), Survived(), settings={"attempts": 2})
        for name, answer in {
            "503": error(503),
            "HTML": Answer(b"<html>"),
            "late": Answer({}, delay=3.0),
            "Retry-After of 30 years": error(503, **{"Retry-After": "1000000000"}),
        }.items()
    ),
    rewarded("answers with a byte order mark", lambda body, n: with_mark(scores(body, n)), Survived()),
    *(
        Fault("reward service", name, OneLine(2, "A reward's address"), files=reward_file(address), environment=KEY)
        for name, address in {
            "a password in the address": f"http://me:{SECRET}@127.0.0.1/",
            "a key in the address": f"http://127.0.0.1/?api_key={SECRET}",
            "no address": "127.0.0.1:80",
        }.items()
    ),
    Fault(
        "reward service",
        "does not listen",
        OneLine(1, *STOPS, "Connect"),
        options=MANY,
        files=reward_file("http://127.0.0.1:9/v1"),
        environment=KEY,
    ),
]


def with_mark(answer: Answer) -> Answer:
    return Answer(b"\xef\xbb\xbf" + json.dumps(answer.body).encode())


def setting(name: str, *words: str, **settings: Any) -> Fault:
    kwargs = SETTINGS | dict(base_url="http://127.0.0.1:9/v1") | settings
    return Fault(
        "judge setting",
        name,
        OneLine(2, *words),
        options=dict(reward_funcs=None, judge="llm", judge_kwargs=kwargs),
        environment=KEY,
    )


JUDGES = [
    *(
        judged(f"answers {name}", always(answer), OneLine(1, *STOPS, judge), quick=name not in ALIKE, **MANY)
        for name, (answer, _, judge) in ANSWERS.items()
    ),
    *(
        judged(f"answers {name} in step 3", after(4, prefers, always(answer)), Survived(like=ANY), quick=name in PART)
        for name, (answer, _, _) in ANSWERS.items()
    ),
    *(
        judged(
            f"refuses with {name} in step 3",
            after(4, prefers, always(answer)),
            Resumes(OneLine(1, "judge", "checkpoint-2")),
            quick=name in PART,
        )
        for name, answer in REFUSALS.items()
    ),
    verdict("nothing", "", "no verdict"),
    verdict("something else", "I would rather talk about the weather", "no verdict"),
    verdict("both", "A B A B", "no verdict"),
    verdict("a refusal", "I cannot help with that", "no verdict"),
    verdict("control characters", "\x1b[2J\x1b[31mgone\x07", "no verdict"),
    verdict("half of a character", "\ud800", "no verdict"),
    completion("no choices", choices=[]),
    completion("choices that are null", choices=None),
    completion("choices of another form", choices={"a": 1}),
    completion("a choice that is a number", choices=[1]),
    completion("a content that is a list", choices=messages([1])),
    completion("a content that is a number", choices=messages(5)),
    completion("a content that is null", choices=messages(None)),
    completion("log-probabilities of another form", choices=[{**messages("A")[0], "logprobs": {"content": [[1]]}}]),
    judged("counts no tokens", always(Answer({**says("A").body, "usage": None})), Survived(like=ANY)),
    judged(
        "counts tokens below nothing",
        always(Answer({**says("A").body, "usage": {"prompt_tokens": -5, "completion_tokens": 10**30}})),
        Survived(like=ANY),
    ),
    *(
        judged(f"answers {name} once", once(prefers, always(answer)), Survived(), settings={"attempts": 2})
        for name, answer in {"503": error(503), "HTML": Answer(b"<html>"), "late": Answer({}, delay=3.0)}.items()
    ),
    setting("a port where nothing listens", "judge").but(ending=OneLine(3, "no_answer")),
    setting("no address", "base_url", base_url="nowhere"),
    setting("a secret in its address", "address", base_url=f"http://me:{SECRET}@127.0.0.1:9/v1"),
    setting("a key in place of a variable", "`api_key_env`", api_key_env="sk-0-1"),
    setting("a variable that is not set", "NOT_SET_KEY", api_key_env="NOT_SET_KEY", base_url="http://example.com/v1"),
    setting("a negative time limit", "request_timeout", request_timeout=-1),
    setting("no attempts", "attempts", attempts=0),
    setting("a time limit that is no number", "question_timeout", question_timeout=".nan"),
    setting("less than no cost", "max_cost", max_cost=-1),
    setting("a failure share above 1", "max_failure_share", max_failure_share=2),
    setting("no such template", "template", template="no_such_template"),
    setting("no rubric file", "rubric_file", rubric_file="none.txt"),
    setting("no such setting", "modell", modell="m"),
]


def cached(name: str, prepare: Change, *words: str, faulty: Respond = prefers) -> Fault:
    settings = {"cache": "cache/judge.sqlite3"}
    fault = judged(name, faulty, Survived(*words, like=ANY), settings=settings)
    return fault.but(kind="judge cache", prepare=prepare)


def in_cache(statement: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "cache").mkdir()
        with sqlite3.connect(folder / "cache" / "judge.sqlite3") as made:
            made.execute(statement)

    return change


def locked(folder: Path) -> None:
    """By another process that does not let go."""
    in_cache("create table other (x)")(folder)
    locked_file(folder / "cache" / "judge.sqlite3")


def locked_file(path: Path) -> None:
    keep = sqlite3.connect(path, isolation_level=None)
    keep.execute("begin exclusive")
    LOCKS.append(keep)


def nothing(folder: Path) -> None:
    """It is made by the run."""


LOCKS: list[sqlite3.Connection] = []
GOES_ON = ("`cache`", "The run goes on")


def a_folder(folder: Path) -> None:
    (folder / "cache" / "judge.sqlite3").mkdir(parents=True)


CACHES = [
    cached("no database", written("cache/judge.sqlite3", "this is no database, " * 100), *GOES_ON),
    cached("empty", written("cache/judge.sqlite3", "")),
    cached("a folder", a_folder, *GOES_ON),
    cached("locked", locked, *GOES_ON, "locked"),
    cached("below a file", written("cache", "x"), *GOES_ON),
    cached("a database of something else", in_cache("create table answers (x text)"), *GOES_ON),
    cached("of another version", in_cache("pragma user_version = 9"), *GOES_ON),
    cached("removed in step 2", nothing, "`cache`", "nothing more can be written").but(
        inject=lambda child: child.at_step(2, lambda: os.remove("cache/judge.sqlite3"))
    ),
    cached("locked in step 2", nothing, "`cache`").but(
        inject=lambda child: child.at_step(2, lambda: locked_file(Path("cache/judge.sqlite3")))
    ),
]
FAULTS = [*REWARDS, *JUDGES, *CACHES]
