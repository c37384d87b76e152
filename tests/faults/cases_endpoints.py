"""Judges and rewards behind HTTP that fail, lie or do not answer, and the judge's cache."""

from __future__ import annotations

import json
import os
import sqlite3
from typing import Any

from faults.damage import written
from faults.harness import ANY, SECRET, Either, Ending, Fault, OneLine, Resumes, Service, Survived
from support.endpoint import Answer, error, says, shown

JUDGE = dict(
    model="m",
    base_url="{url}",
    api_key_env="JUDGE_KEY",
    cache=None,
    attempts=1,
    request_timeout=1.0,
    question_timeout=3.0,
)
KEY = {"JUDGE_KEY": SECRET, "HOME": "/nonexistent"}
REWARD = """
from online_dpo.scoring import HTTPReward
words = HTTPReward("{url}", attempts=1, timeout=1.0, api_key_env="JUDGE_KEY")
"""
COUNTED = Either(Survived(like=ANY), OneLine(3), OneLine(1))
"""Failures that are counted: enough of them stop the run."""


def prefers(body: dict[str, Any], number: int) -> Answer:
    first, second = shown(body)
    return says("A", 0.9) if sum(map(ord, first)) >= sum(map(ord, second)) else says("B", 0.1)


def scores(body: dict[str, Any], number: int) -> Answer:
    return Answer({"scores": [sum(map(ord, text)) % 101 / 101 for text in body["completions"]]})


def after(number_of_right: int, right, faulty):
    """Faulty from this request on."""
    return lambda body, number: faulty(body, number) if number >= number_of_right else right(body, number)


def deep(depth: int = 100_000) -> bytes:
    return b'{"choices": ' + b"[" * depth + b"]" * depth + b"}"


def judged(name: str, faulty, ending: Ending, start: int = 8, quick: bool = True, **settings: Any) -> Fault:
    return Fault(
        "judge service",
        name,
        ending,
        options=dict(reward_funcs=None, judge="llm", judge_kwargs=JUDGE | settings),
        environment=KEY,
        service=Service(after(start, prefers, faulty), prefers),
        quick=quick,
    )


def rewarded(name: str, faulty, ending: Ending, start: int = 2, quick: bool = True) -> Fault:
    return Fault(
        "reward service",
        name,
        ending,
        files={"feedback.py": REWARD},
        environment=KEY,
        service=Service(after(start, scores, faulty), scores),
        quick=quick,
    )


ANSWERS: dict[str, Any] = {
    "500": lambda body, number: error(500),
    "503 with a long wait": lambda body, number: error(503, **{"Retry-After": "3600"}),
    "429": lambda body, number: error(429),
    "401": lambda body, number: error(401, "your key is wrong"),
    "402": lambda body, number: error(402, "pay"),
    "404": lambda body, number: error(404),
    "400": lambda body, number: error(400),
    "an empty body": lambda body, number: Answer(b""),
    "HTML": lambda body, number: Answer(b"<html><body>down</body></html>", headers={"Content-Type": "text/html"}),
    "half of the JSON": lambda body, number: Answer(b'{"choices": [{"mess'),
    "JSON null": lambda body, number: Answer(None),
    "a JSON list": lambda body, number: Answer([1, 2]),
    "nothing for a while": lambda body, number: Answer({}, delay=1.5),
    "byte after byte": lambda body, number: Answer({"x": "y" * 50}, drip=0.1),
    "deep nesting": lambda body, number: Answer(deep()),
    "no UTF-8": lambda body, number: Answer(b'{"a": "\xff\xfe"}'),
    "an endless header": lambda body, number: Answer({}, headers={"X-Long": "x" * 200_000}),
    "16 MB": lambda body, number: Answer(b'{"a": "' + b"x" * 16_000_000 + b'"}'),
    "a redirect to itself": lambda body, number: Answer(b"", 302, {"Location": "/v1/chat/completions"}),
    "control characters in its error": lambda body, number: error(400, "\x1b[2J\x1b[31mgone\x07"),
}
VERDICTS: dict[str, Any] = {
    "no choices": lambda body, number: Answer({"id": "1", "object": "chat.completion", "choices": []}),
    "no content": lambda body, number: says(""),
    "something else": lambda body, number: says("I would rather talk about the weather"),
    "both": lambda body, number: says("A B A B"),
    "a refusal": lambda body, number: says("I cannot help with that"),
}


def with_scores(value: Any):
    return lambda body, number: Answer({"scores": [value] * len(body["completions"])})


SCORES: dict[str, Any] = {
    "texts": with_scores("1"),
    "booleans": with_scores(True),
    "null": with_scores(None),
    "lists": with_scores([1.0]),
    "NaN": lambda body, number: Answer(json.dumps({"scores": [float("nan")] * len(body["completions"])}).encode()),
    "10**400": lambda body, number: Answer(
        json.dumps({"scores": [0] * len(body["completions"])}).replace("0", "1" + "0" * 400).encode()
    ),
    "a number of 5000 digits": lambda body, number: Answer(
        json.dumps({"scores": [0] * len(body["completions"])}).replace("0", "1" + "0" * 5000).encode()
    ),
    "one too few": lambda body, number: Answer({"scores": [1.0] * (len(body["completions"]) - 1)}),
    "one too many": lambda body, number: Answer({"scores": [1.0] * (len(body["completions"]) + 1)}),
    "no scores": lambda body, number: Answer({"score": 1}),
    "a dict": lambda body, number: Answer({"scores": {"0": 1.0}}),
}


def with_cache(name: str, prepare, ending: Ending) -> Fault:
    fault = judged(name, prefers, ending, cache="cache/judge.sqlite3")
    return fault.but(kind="judge cache", prepare=prepare)


def locked(folder) -> None:
    """By another process that does not let go."""
    (folder / "cache").mkdir()
    keep = sqlite3.connect(folder / "cache" / "judge.sqlite3", isolation_level=None)
    keep.execute("create table other (x)")
    keep.execute("begin exclusive")
    LOCKS.append(keep)


LOCKS: list[sqlite3.Connection] = []


def folder_in_its_place(folder) -> None:
    (folder / "cache" / "judge.sqlite3").mkdir(parents=True)


def fields(name: str, *words: str, **settings: Any) -> Fault:
    return Fault(
        "judge service",
        name,
        OneLine(2, *words),
        options=dict(
            reward_funcs=None, judge="llm", judge_kwargs=JUDGE | dict(base_url="http://127.0.0.1:9/v1") | settings
        ),
        environment=KEY,
    )


SAMPLE = (
    "500",
    "401",
    "an empty body",
    "half of the JSON",
    "byte after byte",
    "deep nesting",
    "control characters in its error",
)
STOPS = ("401", "402", "404", "a redirect to itself")
"""What stops a run at once; everything else is counted."""

FAULTS = [
    *(
        judged(f"says {name}", answer, Resumes(OneLine(1, "judge")) if name in STOPS else COUNTED, quick=name in SAMPLE)
        for name, answer in ANSWERS.items()
    ),
    *(judged(f"says {name}", answer, COUNTED) for name, answer in VERDICTS.items()),
    *(
        judged(f"says {name} from the beginning", answer, Either(OneLine(1), OneLine(3)), start=0, quick=name in SAMPLE)
        for name, answer in (ANSWERS | VERDICTS).items()
    ),
    *(
        rewarded(f"says {name}", answer, Resumes(OneLine(1, "v1")) if name in STOPS else COUNTED, quick=name in SAMPLE)
        for name, answer in ANSWERS.items()
    ),
    *(rewarded(f"gives {name}", answer, COUNTED) for name, answer in SCORES.items()),
    fields("has a port where nothing listens", "judge").but(
        ending=Either(OneLine(1, "judge"), OneLine(3, "no_answer"))
    ),
    fields("has no address", "base_url", base_url="nowhere"),
    fields("has a secret in its address", "base_url", base_url="http://me:secret@127.0.0.1:9/v1"),
    fields("has a negative time limit", "request_timeout", request_timeout=-1),
    fields("has no attempts", "attempts", attempts=0),
    fields("has a time limit that is no number", "question_timeout", question_timeout=".nan"),
    fields("may cost less than nothing", "max_cost", max_cost=-1),
    fields("has a failure share above 1", "max_failure_share", max_failure_share=2),
    fields("has no such template", "template", template="no_such_template"),
    fields("has no rubric file", "rubric_file", rubric_file="none.txt"),
    fields("has no such setting", "modell", modell="m"),
    with_cache("is no database", written("cache/judge.sqlite3", "this is no database, " * 100), Survived("cache")),
    with_cache("is empty", written("cache/judge.sqlite3", ""), Survived()),
    with_cache("is a folder", folder_in_its_place, Either(Survived("cache"), OneLine(2, "cache"))),
    with_cache("is locked", locked, Survived("cache")),
    with_cache("lies below a file", written("cache", "x"), Either(Survived("cache"), OneLine(2, "cache"))),
    with_cache("is a database of something else", lambda folder: other_database(folder), Survived("cache")),
]


def other_database(folder) -> None:
    os.mkdir(folder / "cache")
    with sqlite3.connect(folder / "cache" / "judge.sqlite3") as made:
        made.execute("create table verdicts (x text)")
        made.execute("create table answers (x text)")
