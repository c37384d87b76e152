"""The other commands, `eval` and `judge`, with hostile input and with scorers and services that fail."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.damage import Change, cut_in_half, edited_tensors, removed
from faults.harness import Ending, Fault, OneLine, Service, Stops, scorer
from faults.services import ANSWERS, KEY, REFUSALS, Respond, after, always, prefers
from support.endpoint import says

PAIRS: list[Any] = [{"prompt": f"w{i} w2", "chosen": "w3 w4", "rejected": f"w{i % 5} w9"} for i in range(24)]
HELD_OUT = '{"prompt": "w1 w2"}\n{"prompt": "w3"}\n'
LOCAL = ("--model", "m", "--base-url", "http://127.0.0.1:9/v1", "--cache", "null")
ENDPOINT = ("--model", "m", "--base-url", "{url}", "--api-key-env", "SERVICE_KEY", "--cache", "null", "--attempts", "1")


def evaluated(
    name: str,
    ending: Ending,
    words: Sequence[str] = (),
    files: dict[str, str | bytes] | None = None,
    prepare: Change | None = None,
    **options: Any,
) -> Fault:
    """`online-dpo eval run.yaml` of a trained model."""
    return Fault(
        "command eval",
        name,
        ending,
        command=("eval", "run.yaml"),
        options={"eval_dataset_name": "eval.jsonl", **options},
        files={"eval.jsonl": HELD_OUT, **(files or {})},
        trained={"eval_dataset_name": "data.jsonl", "learning_rate": 0.3},
        words=words,
        prepare=prepare,
    )


def judged(
    name: str, ending: Ending, pairs: str | bytes, respond: Respond = prefers, words: Sequence[str] = ()
) -> Fault:
    """`online-dpo judge pairs.jsonl` with a language model as judge."""
    return Fault(
        "command judge",
        name,
        ending,
        command=("judge", "pairs.jsonl"),
        files={"pairs.jsonl": pairs},
        environment=KEY,
        words=(*ENDPOINT, *words),
        service=Service(respond, prefers),
    )


def pairs(rows: Sequence[object]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def nan_model(folder: Path) -> None:
    edited_tensors("out/model.safetensors", lambda t: [x.fill_(float("nan")) for x in t.values()])(folder)


EVALUATIONS = [
    evaluated("none", Stops(0, "Win rate")),
    evaluated("no model", OneLine(2, "out"), prepare=removed("out")),
    evaluated("half of the model", OneLine(2, "out"), prepare=cut_in_half("out/model.safetensors")),
    evaluated("a model of NaN", OneLine(2, "out", "finite"), prepare=nan_model),
    evaluated("no such model", OneLine(2, "nowhere"), ("--model", "./nowhere")),
    evaluated("a file as model", OneLine(2, "data.jsonl"), ("--model", "data.jsonl")),
    evaluated("no such opponent", OneLine(2, "nowhere"), ("--against", "./nowhere")),
    evaluated("no such prompts", OneLine(2, "nowhere.jsonl"), ("--prompts", "nowhere.jsonl")),
    evaluated("a broken row", OneLine(2, "Row 1"), files={"eval.jsonl": '{"prompt": "w1"}\n{"prompt": null}\n'}),
    evaluated("an empty file of prompts", OneLine(2, "eval.jsonl"), files={"eval.jsonl": ""}),
    evaluated("a deep file of prompts", OneLine(2, "eval.jsonl"), files={"eval.jsonl": "[" * 20_000}),
    evaluated("no samples", OneLine(2, "samples"), ("--samples", "0")),
    evaluated("samples without end", OneLine(2, "samples"), ("--samples", "1000000000000")),
    evaluated("a negative limit", OneLine(2, "limit"), ("--limit", "-1")),
    evaluated("a temperature of NaN", OneLine(2, "`temperature`"), ("--temperature", ".nan")),
    evaluated("no such function", OneLine(2, "nope"), ("--reward", "feedback.py:nope")),
    evaluated("no such file of functions", OneLine(2, "nope.py"), ("--reward", "nope.py:words")),
    evaluated("a folder that is not there to write to", OneLine(2, "no/where"), ("--json", "no/where/x.json")),
    evaluated("a folder as the file to write to", OneLine(2, "policy"), ("--json", "policy")),
    evaluated("a device that is full", OneLine(2, "/dev/full"), ("--output", "/dev/full")),
    evaluated("a full device for figures", OneLine(1, "/dev/full"), ("--json", "/dev/full")),
    *(
        evaluated(f"a reward that {name}", ending, files={"feedback.py": scorer(before, returns)})
        for name, before, returns, ending in [
            ("raises", "raise ConnectionError('away')", "scores", OneLine(1, "words", "away")),
            ("calls sys.exit(0)", "sys.exit(0)", "scores", OneLine(1, "words")),
            ("gives NaN", "", "[float('nan')] * len(scores)", OneLine(1, "words")),
            ("gives 10**400", "", "[10**400] * len(scores)", OneLine(1, "words")),
            ("gives None", "", "[None] * len(scores)", OneLine(1, "words")),
            ("gives too few", "", "scores[1:]", OneLine(1, "words")),
            ("gives texts", "", "['1'] * len(scores)", OneLine(1, "words")),
        ]
    ),
    evaluated(
        "a judge that raises",
        OneLine(1, "judge", "away"),
        ("--judge", "judge.py:judge", "--samples", "4"),
        files={"judge.py": "def judge(prompt, first, second):\n    raise ConnectionError('away')\n"},
    ),
    evaluated(
        "a judge that gives NaN",
        OneLine(1, "judge"),
        ("--judge", "judge.py:judge", "--samples", "4"),
        files={"judge.py": "def judge(prompt, first, second):\n    return float('nan')\n"},
    ),
    evaluated(
        "a judge that gives 10**5000",
        OneLine(1, "judge"),
        ("--judge", "judge.py:judge", "--samples", "4"),
        files={"judge.py": "def judge(prompt, first, second):\n    return 10**5000\n"},
    ),
]
JUDGEMENTS = [
    judged("none", Stops(0), pairs(PAIRS)),
    judged("no pairs", OneLine(2, "pairs.jsonl"), ""),
    judged("no JSON", OneLine(2, "pairs.jsonl"), pairs([*PAIRS, "{prompt"])),
    judged("a list", OneLine(2, "pairs.jsonl"), pairs([[1]])),
    judged("no rejected", OneLine(2, "pairs.jsonl", "rejected"), pairs([{"prompt": "w1", "chosen": "w2"}])),
    judged("a number for an answer", OneLine(2, "pairs.jsonl"), pairs([PAIRS[0] | {"chosen": 5}])),
    judged("null for an answer", OneLine(2, "pairs.jsonl"), pairs([PAIRS[0] | {"chosen": None}])),
    judged("another label", OneLine(2, "label"), pairs([dict(prompt="w", response_a="a", response_b="b", label="c")])),
    judged(
        "half of a character",
        OneLine(2, "pairs.jsonl"),
        pairs(['{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}']),
    ),
    judged("no UTF-8", OneLine(2, "pairs.jsonl"), b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}\n'),
    judged("20,000 levels", OneLine(2, "pairs.jsonl"), '{"prompt": ' + "[" * 20_000 + "]" * 20_000 + "}\n"),
    judged(
        "a row of 5000 digits",
        OneLine(2, "pairs.jsonl"),
        '{"prompt": ' + "1" * 5000 + ', "chosen": "a", "rejected": "b"}\n',
    ),
    judged(
        "a key twice", OneLine(2, "pairs.jsonl"), '{"prompt": "w", "prompt": "v", "chosen": "a", "rejected": "b"}\n'
    ),
    judged("control characters", Stops(0), pairs([row | {"chosen": "\x1b[2Jw\x07"} for row in PAIRS])),
    judged("a full device", OneLine(1, "/dev/full"), pairs(PAIRS), words=("--output", "/dev/full")),
    judged("a folder to write to", OneLine(2, "policy"), pairs(PAIRS), words=("--output", "policy")),
    judged("its own file to write to", OneLine(2, "pairs.jsonl"), pairs(PAIRS), words=("--output", "pairs.jsonl")),
    judged("a limit of nothing", OneLine(2, "limit"), pairs(PAIRS), words=("--limit", "0")),
    judged("a template that is not there", OneLine(2, "template"), pairs(PAIRS), words=("--template", "nope")),
    judged("no verdict", OneLine(1, "no verdict"), pairs(PAIRS), always(says("Both."))),
    *(
        judged(f"answers {name}", OneLine(1, "gave no usable answer"), pairs(PAIRS), always(ANSWERS[name][0]))
        for name in ("500", "HTML", "deep nesting", "control characters in its error", "20 MB")
    ),
    *(
        judged(f"refuses with {name}", OneLine(1, "judge"), pairs(PAIRS), after(4, prefers, always(answer)))
        for name, answer in REFUSALS.items()
    ),
]
OTHERS = [
    Fault("command", "no such command", OneLine(2, "train"), command=("trian", "run.yaml")),
    Fault("command", "a run file alone", OneLine(2), command=("run.yaml",)),
    Fault("command", "eval without anything", Stops(2, "usage"), command=("eval",)),
    Fault("command", "judge without anything", OneLine(2), command=("judge",)),
    Fault("command", "judge of a folder", OneLine(2, "policy"), command=("judge", "policy", *LOCAL), environment=KEY),
    Fault("command", "eval of no run file", OneLine(2, "nope.yaml"), command=("eval", "nope.yaml")),
    Fault("command", "schema into a full device", OneLine(2), command=("schema", "extra")),
]
FAULTS = [*EVALUATIONS, *JUDGEMENTS, *OTHERS]
