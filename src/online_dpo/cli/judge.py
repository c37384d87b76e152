"""``online-dpo judge``: what a judge says of pairs in a file. Here the arguments and the file are checked."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from online_dpo.cli.schema import PACKAGE, FieldSpec, read_class
from online_dpo.judge_settings import INCONSISTENT, ORDERS, JudgeSettings

KINDS = {"str": str, "int": int, "float": float}
CHOICES = {"order": ORDERS, "inconsistent": INCONSISTENT}
NO_OPTION = ("extra", "logprobs", "cache")
LABELS = {"a": 1.0, "response_a": 1.0, "0": 1.0, "b": 0.0, "response_b": 0.0, "1": 0.0, "tie": None}


@dataclass(frozen=True)
class LabelledPair:
    """One line of the file.

    >>> LabelledPair({"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}, "Hi", "Hello!", "No.", label=1.0,
    ... placed=False)

    ``label`` is 1 where ``first`` is known to be the better one, 0 where it is the worse one, ``None`` where nothing is
    known. ``placed``: whether the file says which of the two stands first, as names such as "chosen" do not.
    """

    row: dict[str, Any]
    prompt: str | list[dict[str, Any]]
    first: str
    second: str
    label: float | None
    placed: bool


def judge(words: Sequence[str]) -> int:
    """Label the file and print a report. Returns the exit code: 0, 1 (the judge failed) or 2 (wrong input)."""
    arguments = vars(_parser().parse_args(words))
    try:
        settings = judge_options(arguments)
        pairs = read_pairs(arguments["file"], arguments["limit"])
        output = arguments["output"]
        if output is not None and not output.absolute().parent.is_dir():
            raise ValueError(f"--output: there is no folder {output.absolute().parent}.")
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    from online_dpo.cli.judge_run import judge_pairs

    return judge_pairs(pairs, arguments["pairwise_model"], settings, output)


def judge_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The settings of the judge that were given, checked; none for a pairwise model.

    Raises:
        ValueError: they contradict each other, or something that they need is not there.
    """
    given = {f.name: arguments[f.name] for f in fields(JudgeSettings) if arguments.get(f.name) is not None}
    if arguments["no_cache"]:
        given["cache"] = None
    elif arguments["cache"] is not None:
        given["cache"] = str(arguments["cache"])
    folder = arguments["pairwise_model"]
    if folder is not None:
        if given:
            raise ValueError(f"--pairwise-model does not go with --{next(iter(given)).replace('_', '-')}.")
        if not (folder / "config.json").is_file():
            raise ValueError(f"--pairwise-model: {folder} is no model folder.")
        return {}
    if "model" not in given:
        raise ValueError("Give --model, the judging model's name at the endpoint, or --pairwise-model.")
    JudgeSettings(**given).check_environment()
    return given


def read_pairs(path: Path, limit: int | None) -> list[LabelledPair]:
    """The pairs of a jsonl file.

    Raises:
        ValueError: it is not there, empty, or a line is no pair; the message says which.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    pairs: list[LabelledPair] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(pairs) == limit:
                break
            if line.strip():
                try:
                    pairs.append(_pair(json.loads(line)))
                except ValueError as problem:
                    raise ValueError(f"{path}:{number}: {problem}") from None
    if not pairs:
        raise ValueError(f"{path}: there are no pairs in it.")
    return pairs


def _pair(row: Any) -> LabelledPair:
    if not isinstance(row, dict):
        raise ValueError("wanted: an object with `prompt`, and two answers.")
    labelled = "chosen" in row and "rejected" in row
    names = ("chosen", "rejected") if labelled else ("response_a", "response_b")
    if missing := [name for name in ("prompt", *names) if name not in row]:
        raise ValueError(f"no {', '.join(f'`{name}`' for name in missing)}.")
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not _is_conversation(prompt):
        raise ValueError("`prompt` must be text or a list of messages.")
    first, second = (_answer(name, row[name]) for name in names)
    label = 1.0 if labelled else _label(row.get("label"))
    return LabelledPair(row, prompt, first, second, label, placed=not labelled)


def _answer(name: str, value: Any) -> str:
    """A text, or the last message of a conversation."""
    if isinstance(value, str):
        return value
    if _is_conversation(value) and isinstance(value[-1]["content"], str):
        return value[-1]["content"]
    raise ValueError(f"`{name}` must be text or a list of messages.")


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    )


def _label(value: Any) -> float | None:
    if value is None:
        return None
    name = str(value).lower()
    if isinstance(value, bool) or name not in LABELS:
        raise ValueError(f"`label` is {value!r}; wanted: a or b, 0 or 1 (the place of the better one), tie or null.")
    return LABELS[name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="online-dpo judge",
        description="Ask a judge about pairs of answers, and report how far it agrees with labels and with itself.",
        epilog="Answers are kept in the cache: what was asked before is not asked again.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="jsonl with `prompt`, and `chosen` and `rejected`, or `response_a`, `response_b` and perhaps `label`",
    )
    parser.add_argument("--output", type=Path, help="jsonl to write: the rows and their `preference`, from 0 to 1")
    parser.add_argument("--limit", type=int, help="judge so many pairs at most")
    parser.add_argument("--pairwise-model", type=Path, metavar="FOLDER", help="a cross-encoder in place of an endpoint")
    parser.add_argument("--cache", type=Path, help=f"file of the cache (default: {JudgeSettings.cache})")
    parser.add_argument("--no-cache", action="store_true", help="keep no answers")
    for spec in read_class(PACKAGE / "judge_settings.py", "JudgeSettings", group="").values():
        if spec.name not in NO_OPTION:
            _add_option(parser, spec)
    return parser


def _add_option(parser: argparse.ArgumentParser, spec: FieldSpec) -> None:
    kind = KINDS[spec.annotation.removesuffix(" | None")]
    value = getattr(JudgeSettings, spec.name, None)  # a required field has none
    default = "" if value is None else f" (default: {value})"
    text = " ".join(spec.doc.replace("`", "").split()).replace("%", "%%")
    parser.add_argument(
        f"--{spec.name.replace('_', '-')}", type=kind, choices=CHOICES.get(spec.name), help=f"{text}{default}"
    )
