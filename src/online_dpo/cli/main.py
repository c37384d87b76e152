"""Entry point of ``online-dpo``. Heavy packages are imported only after the arguments have been checked."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from online_dpo import __version__
from online_dpo.cli.parser import WRONG_INPUT, OneLineParser
from online_dpo.distributed.processes import why_not_alone
from online_dpo.errors import printable

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


@dataclass(frozen=True)
class Command:
    """A command of ``online-dpo``: its line in ``--help``, and the function that gets its words.

    ``run`` returns the exit code. With ``one_process``, the command refuses to start under torchrun and the like.
    """

    help: str
    run: Callable[[Sequence[str]], int]
    one_process: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (the run failed), 2 (wrong input), 130 (interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `online-dpo train --help | head`
        sys.stderr.close()
        return 0


def _run(words: list[str]) -> int:
    command = COMMANDS.get(words[0]) if words else None
    if command is None:
        return _without_command(words)
    if command.one_process and (problem := why_not_alone(f"online-dpo {words[0]}")):
        print(f"error: {problem}", file=sys.stderr)
        return WRONG_INPUT
    return command.run(words[1:])


def _without_command(words: list[str]) -> int:
    """Print help or the version, or say what is wrong with the first word."""
    if words and words[0] not in ("-h", "--help", "--version"):
        print(f"error: {printable(_no_command(words[0]))}", file=sys.stderr)
        return WRONG_INPUT
    _parser().parse_args(words[:1])
    raise AssertionError("the parser exits: it requires a command")


def _no_command(word: str) -> str:
    if word.endswith((".yaml", ".yml")):
        return f"a run file comes after a command: online-dpo train {word}"
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else f" Commands: {', '.join(COMMANDS)}."
    if word.startswith("-"):
        return f"there is no option `{word}`; a command comes first: {', '.join(COMMANDS)}. See: online-dpo --help"
    return f"there is no command `{word}`.{hint} See: online-dpo --help"


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="online-dpo", description="Train a language model on preferences collected while it trains."
    )
    parser.add_argument("--version", action="version", version=f"online-dpo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar=f"{{{','.join(COMMANDS)}}}", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


def _train(words: Sequence[str]) -> int:
    """Check the run; only then import what trains it."""
    from online_dpo.cli.runfile.help import USAGE, train_help
    from online_dpo.cli.runfile.planning import run_checked
    from online_dpo.cli.runfile.run_file import RunPlan, plan_run
    from online_dpo.cli.terminal.header import INDENT, describe_plan, is_first_process
    from online_dpo.cli.terminal.screen import print_lines

    def run(plan: RunPlan, words: list[str], show_traceback: bool) -> int:
        for warning in plan.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if is_first_process():
            print_lines(describe_plan(plan), INDENT)
            print_lines(["Loading torch, transformers and the models"])
        from online_dpo.cli.train import train

        return train(plan, words, show_traceback=show_traceback)

    return run_checked(words, usage=USAGE, help=train_help, plan=plan_run, run=run)


def _imported(module: str, function: str) -> Callable[[Sequence[str]], int]:
    """A command whose module is imported when it runs."""

    def run(words: Sequence[str]) -> int:
        return getattr(import_module(module), function)(words)

    return run


COMMANDS = {
    "train": Command("train as a YAML file says", _train),
    "eval": Command(
        "compare a model with another on held-out prompts",
        _imported("online_dpo.cli.eval", "evaluate"),
        one_process=True,
    ),
    "judge": Command(
        "ask a judge about pairs of answers in a file", _imported("online_dpo.cli.judge", "judge"), one_process=True
    ),
    "serve": Command(
        "start a vLLM server that takes the trainer's weights", _imported("online_dpo.cli.serve", "serve")
    ),
    "quickstart": Command(
        "train a tiny model on embedded data, offline, on any computer",
        _imported("online_dpo.cli.quickstart", "quickstart"),
        one_process=True,
    ),
    "schema": Command(
        "print a JSON Schema of run files, for editors", _imported("online_dpo.cli.runfile.json_schema", "print_schema")
    ),
}
"""The commands by name, in the order of ``--help``."""
