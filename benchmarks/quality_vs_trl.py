"""What training is worth: the gold score of our trainer and of TRL's, at equal compute and at equal KL.

    python benchmarks/quality_vs_trl.py --seconds 60 --seeds 0 1 --json benchmarks/results/quality-cpu.json
    python benchmarks/quality_vs_trl.py --chart                                  # the chart and the page's tables
    python benchmarks/quality_vs_trl.py --tiny --seconds 2 --seeds 0             # does it work?

Both train the quickstart's policy on its reward model and prompts, with the same settings, for the same CPU seconds.
Then `online-dpo eval`'s code lets every checkpoint answer held-out prompts: the quickstart's rubric, which nothing is
trained on, gives the gold score, and the log-probabilities of the answers the KL to the start, in nats an answer.
Each seed has a start of its own, which all rows share. TRL runs at its best: without gradient checkpointing, so with
its KV cache on, and on chat messages, without which it hides the end of an answer from the reward model. Seconds are
those of the process, in one thread: what else the machine does hardly counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import describe_machine, versions
from quality_curves import chart, compared, readme_rows, tables, with_tables
from quality_runs import ROWS, Training, shared_settings, train_in_a_process
from quality_scores import HeldOut, scored

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality-cpu.json"
PAGE = ROOT / "docs" / "project" / "performance.md"
CHART = ROOT / "docs" / "images" / "quality-vs-trl.svg"
OF_ONE_RUN = ("output_dir", "seed", "max_steps")


def main() -> None:
    options = parse_options()
    if options.chart:
        result = json.loads(RESULTS.read_text())
        CHART.write_text(chart(result))
        PAGE.write_text(with_tables(PAGE.read_text(), result))
        print("\n".join(["For the README:", *readme_rows(result)]))
        return
    if importlib.util.find_spec("trl") is None:
        print("quality_vs_trl.py: error: trl is not installed: pip install 'online-dpo[bench]'", file=sys.stderr)
        raise SystemExit(2)
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder).absolute(), options)
    print(tables(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    rows = ["trl", "ours-pairs", "ours"]
    add("--rows", nargs="+", choices=list(ROWS), default=rows, metavar="NAME", help=", ".join(ROWS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    add("--seconds", type=float, default=150.0, help="CPU seconds of each training (150)")
    add("--steps", type=int, default=2000, help="end a training after so many steps, if that comes first (2000)")
    add("--beta", type=float, default=0.2, help="of both (0.2)")
    add("--learning-rate", type=float, default=5e-4, help="of both (5e-4)")
    add("--prompts", type=int, default=300, help="held-out prompts (300)")
    add(
        "--folder",
        type=Path,
        help="where models are kept; what is there is not trained again (a folder that is removed)",
    )
    add("--tiny", action="store_true", help="models that know nothing, to see that it works")
    add("--json", type=Path, help="file to write all figures to")
    add("--chart", action="store_true", help="write chart and tables of the stored figures into docs, and end")
    return parser.parse_args()


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates everything, and returns what the JSON file holds."""
    import torch

    torch.set_num_threads(1)
    points: dict[str, dict[str, Any]] = {row: {} for row in options.rows}
    for seed in options.seeds:
        start = make_start(folder / f"seed-{seed}" / "start", seed, options.tiny)
        for row in options.rows:
            print(f"seed {seed}: {ROWS[row].title}", file=sys.stderr)
            training = training_of(row, start, seed, options)
            trained = train_in_a_process(training)
            points[row][str(seed)] = scored(trained, start, Path(training.folder), HeldOut(options.prompts))
    of_any = training_of(options.rows[0], start, 0, options)
    settings = {name: value for name, value in shared_settings(of_any).items() if name not in OF_ONE_RUN}
    return {
        "device": describe_machine("cpu", 1),
        "versions": versions(),
        "command": " ".join(["python", "benchmarks/quality_vs_trl.py", *sys.argv[1:]]),
        "seconds": options.seconds,
        "held_out_prompts": options.prompts,
        "settings": settings,
        "rows": {row: asdict(ROWS[row]) for row in options.rows},
        "comparison": compared(points),
        "points": points,
    }


def training_of(row: str, start: Path, seed: int, options: argparse.Namespace) -> Training:
    return Training(
        row=row,
        start=str(start),
        folder=str(start.parent / row),
        seed=seed,
        seconds=options.seconds,
        steps=options.steps,
        beta=options.beta,
        learning_rate=options.learning_rate,
    )


def make_start(folder: Path, seed: int, tiny: bool) -> Path:
    """The models and prompts that the trainings of a seed begin with."""
    from online_dpo.quickstart.artifacts import build
    from online_dpo.quickstart.models import FULL, TINY

    if not (folder / "prompts_test.jsonl").exists():  # the last file that is written
        print(f"seed {seed}: making a policy and a reward model", file=sys.stderr)
        build(folder, seed=seed, size=TINY if tiny else FULL)
    return folder


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
