"""Entry point of ``online-dpo``. Heavy packages are imported only after the arguments have been checked."""

from __future__ import annotations

import difflib
import errno
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from online_dpo import __version__
from online_dpo.cli.parser import WRONG_INPUT, OneLineParser
from online_dpo.cli.runfile.planning import HELP_WORDS
from online_dpo.cli.terminal.errors import report_error
from online_dpo.cli.terminal.streams import Streams, sturdy_streams
from online_dpo.distributed.processes import why_not_alone
from online_dpo.distributed.signals import StoppedBySignal, handling, is_interruption, raise_stopped
from online_dpo.errors import TrainingInterrupted, printable

FAILED = 1


@dataclass(frozen=True)
class Command:
    """A command of ``online-dpo``: its line in ``--help``, and the function that gets its words.

    ``run`` returns the exit code. With ``one_process``, the command refuses to start under torchrun and the like.
    ``prints_result``: it fails if standard output cannot be written; without, it goes on: its result is elsewhere.
    ``takes_traceback``: ``--traceback`` is one of its own words.
    """

    help: str
    run: Callable[[Sequence[str]], int]
    one_process: bool = False
    prints_result: bool = True
    takes_traceback: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (the run failed), 2 (wrong input), 3 (nothing was trained),
    128 plus the number of the signal that stopped it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    leaving = None
    with sturdy_streams() as streams, handling(raise_stopped):
        try:
            code = _run(words, streams)
        except SystemExit as leaving_parser:  # it has printed help, or an error
            leaving, code = leaving_parser, leaving_parser.code
        except BaseException as error:
            code = _told_end(error, "--traceback" in words)
    if code == 0 and (failure := _lost_result(words, streams)) is not None:
        print(f"error: {failure}", file=sys.stderr)
        return FAILED
    if leaving is not None:
        raise leaving
    return code  # pyright: ignore[reportReturnType]


def _told_end(error: BaseException, show_traceback: bool) -> int:
    """Say in a line what ended the command, and return its exit code."""
    if isinstance(error, KeyboardInterrupt) and is_interruption(error):
        number = error.signal if isinstance(error, (StoppedBySignal, TrainingInterrupted)) else signal.SIGINT
        in_training = isinstance(error, TrainingInterrupted) or number is not signal.SIGINT
        print(f"\n{error if in_training else 'Interrupted.'}", file=sys.stderr)
        return 128 + number
    return report_error(error, FAILED, show_traceback)


def _lost_result(words: list[str], streams: Streams) -> str | None:
    """What to say of a result that could not be printed. A reader that has seen enough of a help text is no failure."""
    failure, command = streams.stdout.failure, COMMANDS.get(words[0]) if words else None
    is_help = command is None or any(word in HELP_WORDS for word in words)
    if failure is None or not (is_help or command is None or command.prints_result):
        return None
    if is_help and failure.errno == errno.EPIPE:
        return None
    return f"the output could not be written: {failure.strerror}."


def _run(words: list[str], streams: Streams) -> int:
    command = COMMANDS.get(words[0]) if words else None
    if command is None:
        return _without_command(words)
    if command.one_process and (problem := why_not_alone(f"online-dpo {words[0]}")):
        print(f"error: {problem}", file=sys.stderr)
        return WRONG_INPUT
    if not command.prints_result and not any(word in HELP_WORDS for word in words):
        streams.tell_failures()
    return command.run([word for word in words[1:] if command.takes_traceback or word != "--traceback"])


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
    "train": Command("train as a YAML file says", _train, prints_result=False, takes_traceback=True),
    "ray": Command(
        "train on a Ray cluster: many GPUs, many machines, vLLM servers",
        _imported("online_dpo.cli.ray", "ray"),
        one_process=True,
        prints_result=False,
        takes_traceback=True,
    ),
    "eval": Command(
        "compare a model with another on held-out prompts",
        _imported("online_dpo.cli.eval", "evaluate"),
        one_process=True,
        takes_traceback=True,
    ),
    "doctor": Command(
        "look at a run before it costs anything", _imported("online_dpo.cli.doctor", "doctor"), one_process=True
    ),
    "judge": Command(
        "ask a judge about pairs of answers in a file", _imported("online_dpo.cli.judge", "judge"), one_process=True
    ),
    "serve": Command(
        "start a vLLM server that takes the trainer's weights",
        _imported("online_dpo.cli.serve", "serve"),
        takes_traceback=True,
    ),
    "quickstart": Command(
        "train a tiny model on embedded data, offline, on any computer",
        _imported("online_dpo.cli.quickstart", "quickstart"),
        one_process=True,
        prints_result=False,
    ),
    "init": Command(
        "write a recipe, a run file for one situation, as a starting point",
        _imported("online_dpo.cli.init", "init"),
        one_process=True,
    ),
    "report": Command(
        "make a page of what a run was and what came of it",
        _imported("online_dpo.cli.report", "report_run"),
        one_process=True,
        prints_result=False,
    ),
    "export": Command(
        "write the pairs of a run as a preference dataset",
        _imported("online_dpo.cli.export", "export_run"),
        one_process=True,
        prints_result=False,
    ),
    "dashboard": Command(
        "look at runs in a browser, also while they train",
        _imported("online_dpo.cli.dashboard", "dashboard"),
        one_process=True,
    ),
    "schema": Command(
        "print a JSON Schema of run files, for editors", _imported("online_dpo.cli.runfile.json_schema", "print_schema")
    ),
}
"""The commands by name, in the order of ``--help``."""
