"""Entry point of ``online-dpo``. Nothing heavy is imported until the arguments have been checked."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from online_dpo import __version__
from online_dpo.cli.parser import OneLineParser, with_hyphens
from online_dpo.distributed.processes import why_not_alone

WRONG_INPUT = 2
COMMANDS = ("train", "eval", "judge", "serve", "quickstart", "schema")
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
IN_ONE_PROCESS = ("eval", "judge", "quickstart")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (the run failed), 2 (wrong input), 130 (interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] and words[0] in IN_ONE_PROCESS and (problem := why_not_alone(f"online-dpo {words[0]}")):
        print(f"error: {problem}", file=sys.stderr)
        return WRONG_INPUT
    try:
        if words[:1] == ["train"]:
            return _train(words[1:])
        if words[:1] == ["serve"]:
            from online_dpo.cli.serve import serve

            return serve(words[1:])
        if words[:1] == ["judge"]:
            from online_dpo.cli.judge import judge

            return judge(words[1:])
        if words[:1] == ["eval"]:
            from online_dpo.cli.eval import evaluate

            return evaluate(words[1:])
        if words[:1] == ["schema"]:
            from online_dpo.cli.runfile.json_schema import print_schema

            return print_schema(words[1:])
        if words[:1] != ["quickstart"]:
            if words and words[0] not in ("-h", "--help", "--version"):
                print(f"error: {_no_command(words[0])}", file=sys.stderr)
                return 2
            _parser().parse_args(words[:1])
        arguments = _quickstart_parser().parse_args(with_hyphens(words[1:]))
        from online_dpo.cli.quickstart import quickstart

        return quickstart(arguments.output_dir, arguments.seed)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `online-dpo train --help | head`
        sys.stderr.close()
        return 0


def _no_command(word: str) -> str:
    if word.endswith((".yaml", ".yml")):
        return f"a run file stands behind a command: online-dpo train {word}"
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
    commands.add_parser("train", help="train as a YAML file says", add_help=False)
    commands.add_parser("eval", help="compare a model with another on held-out prompts", add_help=False)
    commands.add_parser("serve", help="start a vLLM server that takes the trainer's weights", add_help=False)
    commands.add_parser("judge", help="ask a judge about pairs of answers in a file", add_help=False)
    commands.add_parser(
        "quickstart", help="train a tiny model on embedded data, offline, on any computer", add_help=False
    )
    commands.add_parser("schema", help="print a JSON Schema of run files, for editors", add_help=False)
    return parser


def _quickstart_parser() -> OneLineParser:
    parser = OneLineParser(
        called_here={"output": "output_dir", "out": "output_dir", "random_seed": "seed"},
        prog="online-dpo quickstart",
        description="Train a tiny model on embedded data, offline, on any computer.",
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/quickstart"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    return parser


def _train(words: Sequence[str]) -> int:
    """Check the run; only then import what trains it."""
    from online_dpo.cli.runfile.help import USAGE, train_help
    from online_dpo.cli.runfile.planning import planned
    from online_dpo.cli.runfile.run_file import RunPlan, plan_run
    from online_dpo.cli.terminal.header import INDENT, describe_plan, is_first_process
    from online_dpo.cli.terminal.screen import say

    def run(plan: RunPlan, words: list[str], show_traceback: bool) -> int:
        for warning in plan.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if is_first_process():
            say(describe_plan(plan), INDENT)
            say(["Loading torch, transformers and the models"])
        from online_dpo.cli.train import train

        return train(plan, words, show_traceback=show_traceback)

    return planned(words, usage=USAGE, help=train_help, plan=plan_run, run=run)
