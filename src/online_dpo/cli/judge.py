"""``online-dpo judge``: ask a judge about the pairs in a file. This module checks the arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from online_dpo.cli.judging.pairs_file import read_pairs
from online_dpo.cli.judging.plan import BuiltInJudge, plan_pairwise_model
from online_dpo.cli.parser import OneLineParser, with_hyphens
from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.run_file import judge_of_run
from online_dpo.cli.runfile.schema import FieldSpec, read_fields_of
from online_dpo.cli.runfile.yaml_text import parse_yaml
from online_dpo.config.llm_judge import JudgeSettings

KINDS = {"str": str, "int": int, "float": float}
CALLED_HERE = {
    "url": "base_url",
    "api_base": "base_url",
    "endpoint": "base_url",
    "host": "base_url",
    "api_key": "api_key_env",
    "key": "api_key_env",
    "judge": "model",
    "judge_model": "model",
    "model_name": "model",
    "judge_kwargs": "extra",
    "prompt": "template",
    "prompt_template": "template",
    "n": "votes",
    "samples": "votes",
    "num_samples": "votes",
    "max_samples": "limit",
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "workers": "concurrency",
    "num_workers": "concurrency",
    "batch_size": "concurrency",
    "rpm": "requests_per_minute",
    "tpm": "tokens_per_minute",
    "timeout": "request_timeout",
    "retries": "attempts",
    "max_retries": "attempts",
    "budget": "max_cost",
    "output_file": "output",
    "out": "output",
}
"""Names of a judge's options in other tools, and the names of the same options here."""
WRITTEN_BY_HAND = ("extra", "logprobs", "cache")
"""Settings of a judge whose options `_add_llm_options` defines; the other options are made from the fields."""


def judge(words: Sequence[str]) -> int:
    """Label the pairs of a file and print a report. Returns the exit code: 0, 1 (judging failed) or 2 (wrong input)."""
    arguments = vars(_parser().parse_args(with_hyphens(list(words))))
    try:
        chosen = chosen_judge(arguments)
        if arguments["limit"] is not None and arguments["limit"] < 1:
            raise ValueError(f"--limit must be 1 or more; it is {arguments['limit']}.")
        pairs = read_pairs(arguments["file"], arguments["limit"])
        _check_output(arguments["output"])
    except UsageError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    from online_dpo.cli.judging.report import judge_pairs

    return judge_pairs(pairs, chosen, arguments["output"])


def _check_output(output: Path | None) -> None:
    if output is not None and not output.absolute().parent.is_dir():
        raise ValueError(f"--output: there is no folder {output.absolute().parent}.")
    if output is not None and output.is_dir():
        raise ValueError(f"--output: {output} is a folder. Give the name of a file.")


def chosen_judge(arguments: dict[str, Any]) -> BuiltInJudge:
    """Choose the judge from the options and the run file, and check its settings.

    Raises:
        ValueError: options contradict each other, or something they need does not exist.
    """
    given = _llm_settings(arguments)
    folder, options = arguments["pairwise_model"], arguments["pairwise_kwargs"]
    if folder is not None:
        return _pairwise_judge(folder, options, given)
    if arguments["config"] is not None:
        of_run = judge_of_run(arguments["config"])
        if of_run.folder is not None and not given and options is None:
            return of_run
        given = {**(of_run.options if of_run.folder is None else {}), **given}
    if options is not None:
        raise ValueError("--pairwise-kwargs goes with --pairwise-model.")
    if "model" not in given:
        raise ValueError("Give --model, the judging model's name at the endpoint, or --pairwise-model.")
    JudgeSettings(**given).check_environment()
    return BuiltInJudge(None, given)


def _llm_settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The settings of a language model that were given as options."""
    given = {f.name: arguments[f.name] for f in fields(JudgeSettings) if arguments.get(f.name) is not None}
    if arguments["no_cache"]:
        given["cache"] = None
    elif arguments["cache"] is not None:
        given["cache"] = str(arguments["cache"])
    if arguments["no_logprobs"]:
        given["logprobs"] = False
    if "extra" in given:
        given["extra"] = _mapping("--extra", given["extra"], "{seed: 0}")
    return given


def _pairwise_judge(folder: Path, options: str | None, given: dict[str, Any]) -> BuiltInJudge:
    if given:
        raise ValueError(f"--pairwise-model does not go with --{next(iter(given)).replace('_', '-')}.")
    given_options = _mapping("--pairwise-kwargs", options or "{}", "{batch_size: 8}")
    try:
        return plan_pairwise_model(folder, given_options)
    except ValueError as problem:
        raise ValueError(f"--pairwise-model: {problem}") from None


def _mapping(name: str, text: str, example: str) -> dict[str, Any]:
    try:
        options = parse_yaml(text)
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"{name} is {text!r}; wanted: such as '{example}'.")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        called_here=CALLED_HERE,
        prog="online-dpo judge",
        description="Ask a judge about pairs of answers, and report how far it agrees with labels and with itself.",
        epilog="Answers are stored in the cache: the same question is not asked again.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="jsonl with `prompt`, and `chosen` and `rejected`, or `response_a`, `response_b` and perhaps `label`",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="RUN_FILE",
        help="use the judge of a run file; options on the command line win",
    )
    parser.add_argument("--output", type=Path, help="jsonl to write: the rows with their `preference`, from 0 to 1")
    parser.add_argument("--limit", type=int, help="judge at most this many pairs")
    parser.add_argument(
        "--pairwise-model", type=Path, metavar="FOLDER", help="a pairwise model on this machine, not an endpoint"
    )
    parser.add_argument(
        "--pairwise-kwargs",
        metavar="OPTIONS",
        help="options of the pairwise model, as in `judge_kwargs` of a run file: '{template: ...}'",
    )
    _add_llm_options(parser)
    return parser


def _add_llm_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings of a language model as judge."""
    parser.add_argument("--cache", type=Path, help=f"file of the cache (default: {JudgeSettings.cache})")
    parser.add_argument("--no-cache", action="store_true", help="do not store answers")
    parser.add_argument(
        "--no-logprobs", action="store_true", help="do not ask for log-probabilities: each answer is a vote"
    )
    parser.add_argument(
        "--extra",
        metavar="FIELDS",
        help="more fields of each request: '{seed: 0}'; null removes one: '{max_tokens: null, "
        "max_completion_tokens: 2000}' for models that know only the other name",
    )
    for spec in read_fields_of("online_dpo.config.llm_judge", "JudgeSettings").values():
        if spec.name not in WRITTEN_BY_HAND:
            _add_option(parser, spec)


def _add_option(parser: argparse.ArgumentParser, spec: FieldSpec) -> None:
    kind = KINDS[spec.annotation.removesuffix(" | None")]
    value = getattr(JudgeSettings, spec.name, None)  # a required field has none
    default = "" if value is None else f" (default: {value})"
    text = " ".join(spec.doc.replace("`", "").split()).replace("%", "%%")
    parser.add_argument(
        f"--{spec.name.replace('_', '-')}", type=kind, choices=spec.choices or None, help=f"{text}{default}"
    )
