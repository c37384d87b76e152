"""What other feedback and other methods are worth on the quickstart: the tables of docs/guides/judges.md
and pairs-and-losses.md.

    python benchmarks/quickstart_figures.py --json benchmarks/results/quickstart.json
    python benchmarks/quickstart_figures.py --tiny --steps 2 --row xpo llm_fair     # does it work?

Each row is a run of the command line, as a user starts it, and a comparison with the untrained model on the test
prompts, by the rubric that nothing is trained on. A row takes a minute or two on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rubric_judges import Respond, biased_judge, fair_judge, serving

from online_dpo.quickstart.artifacts import build
from online_dpo.quickstart.models import FULL, TINY
from online_dpo.quickstart.run import write_run_file

PAIRWISE_RECIPE = Path(__file__).parents[1] / "recipes" / "judges" / "quickstart.py"
RUN_FOLDER = Path("runs/quickstart")
JUDGE_FOLDER = RUN_FOLDER / "start" / "judge"
PAIRWISE_TEMPLATE = "{prompt} {first}<eos>{prompt} {second}<eos>"
NASH_MD = ("--method", "nash_md", "--beta", "0.02", "--mixture_coef", "0.25")


@dataclass(frozen=True)
class Row:
    """A line of the table: options of `online-dpo train`, and the settings of its judge if it has one.

    ``endpoint`` answers the questions of a judge that is a language model.
    """

    title: str
    options: tuple[str, ...] = ()
    judge: str | None = None
    judge_kwargs: dict[str, Any] | None = None
    endpoint: Respond | None = None


ONE_ORDER = {"order": "given", "logprobs": False}
ROWS = {
    "xpo": Row("reward model, XPO", ("--method", "xpo")),
    "nash_md": Row("reward model, Nash-MD", NASH_MD),
    "pairwise": Row("pairwise model", judge=str(JUDGE_FOLDER), judge_kwargs={"template": PAIRWISE_TEMPLATE}),
    "llm_fair": Row("LLMJudge that judges by the rubric", judge="llm", endpoint=fair_judge),
    "llm_biased": Row("LLMJudge that likes the first place, in both orders", judge="llm", endpoint=biased_judge),
    "llm_one_order": Row(
        "the same judge, asked in one order for its letter", judge="llm", judge_kwargs=ONE_ORDER, endpoint=biased_judge
    ),
}


@dataclass(frozen=True)
class Figures:
    """Win rate against the start with its 95 % interval, and the position bias of the judge, if there is one."""

    win_rate: float
    low: float
    high: float
    position_bias: float | None


def main() -> None:
    options = parse_options()
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder).resolve(), options.row, options.steps, options.tiny)
    print_table(figures)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"steps": options.steps, "rows": {name: asdict(row) for name, row in figures.items()}}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(ROWS)
    parser.add_argument("--row", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a run (100)")
    parser.add_argument("--tiny", action="store_true", help="models that know nothing, to see that it works")
    parser.add_argument("--folder", type=Path, help="where models and runs are kept (a folder that is removed)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args()


def measure(folder: Path, names: list[str], steps: int, tiny: bool) -> dict[str, Figures]:
    """The figures of these rows. Models and runs go into ``folder``."""
    print("Making a policy and a reward model", file=sys.stderr)
    build(folder / RUN_FOLDER / "start", size=TINY if tiny else FULL)
    write_run_file(folder / RUN_FOLDER)
    if "pairwise" in names:
        print("Making a pairwise model", file=sys.stderr)
        few = ("--comparisons", 40) if tiny else ()
        run(folder, PAIRWISE_RECIPE, RUN_FOLDER / "start", *few)
    figures = {}
    for name in names:
        figures[name] = figures_of(folder, name, steps)
        print(f"{name}: {described(figures[name])}", file=sys.stderr)
    return figures


def figures_of(folder: Path, name: str, steps: int) -> Figures:
    """Trains a row's policy and compares it with the start."""
    row = ROWS[name]
    with serving(row.endpoint) if row.endpoint else nullcontext() as address:
        return train_and_compare(folder, Path("runs") / name, steps, (*row.options, *judge_options(row, address)))


def judge_options(row: Row, address: str | None) -> tuple[str, ...]:
    if row.judge is None:
        return ()
    where = {} if address is None else {"model": "m", "base_url": address, "cache": None}
    given = json.dumps({**where, **(row.judge_kwargs or {})})
    return ("--reward_model_path", "null", "--judge", row.judge, "--judge_kwargs", given)


def train_and_compare(folder: Path, out: Path, steps: int, options: tuple[str, ...]) -> Figures:
    run_file, start = RUN_FOLDER / "run.yaml", RUN_FOLDER / "start"
    length = ("--num_completions", 2, "--max_steps", steps, "--save_strategy", "steps", "--save_steps", steps)
    run(folder, "-m", "online_dpo", "train", run_file, "--output_dir", out, *length, *options)
    test = ("--prompts", start / "prompts_test.jsonl", "--json", out / "eval.json")
    run(folder, "-m", "online_dpo", "eval", run_file, "--model", out, *test)
    won = json.loads((folder / out / "eval.json").read_text())["win_rate"]
    state = json.loads((folder / out / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    logs = [log for log in state["log_history"] if "judge/position_bias" in log]
    return Figures(won["value"], won["low"], won["high"], logs[-1]["judge/position_bias"] if logs else None)


def run(folder: Path, *words: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-3000:]}")


def described(figures: Figures) -> str:
    return f"{figures.win_rate:.2f}, {figures.low:.2f} to {figures.high:.2f}"


def print_table(figures: dict[str, Figures]) -> None:
    """A table in Markdown; docs/guides/judges.md and pairs-and-losses.md show its rows."""
    print("| feedback and method | win rate against the start, 95 % interval | `judge/position_bias` |")
    print("|---|---|---|")
    for name, row in figures.items():
        bias = "" if row.position_bias is None else f"{row.position_bias:.2f}"
        print(f"| {ROWS[name].title} | {described(row)} | {bias} |")


if __name__ == "__main__":
    main()
