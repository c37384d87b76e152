"""The quickstart: create the models, train with Online DPO, and measure the improvement with the hidden rubric."""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.collate import prompts_from_batch
from online_dpo.data.load import load_prompts
from online_dpo.data.prompts import prepare_prompts
from online_dpo.evaluation.conclusions import comparison_conclusion
from online_dpo.quickstart.artifacts import build
from online_dpo.quickstart.language import sample_requests
from online_dpo.quickstart.models import FULL, QuickstartArtifacts, QuickstartSize, reward_model_accuracy
from online_dpo.quickstart.rubric import is_right, rubric
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from online_dpo.scoring.rewards.loading import load_reward_model
from online_dpo.scoring.rewards.model import RewardModelScorer
from online_dpo.stats.intervals import win_rate
from online_dpo.stats.preference import preference_by_score
from online_dpo.training.trainer import OnlineDPOTrainer
from online_dpo.types import Group, Prompt

RUN_FILE = Path(__file__).with_name("run.yaml")
SCHEMA = Path(__file__).parents[1] / "run.schema.json"
DEFAULT_OUTPUT = Path("runs/quickstart")
PROMPTS_FOR_KL = 200
FIELDS_SET_HERE = (
    *("model_name_or_path", "dataset_name", "eval_dataset_name", "reward_model_path", "eval_reward_funcs"),
    "output_dir",
)


@dataclass(frozen=True)
class PolicyAnswers:
    """A policy's answers to the test prompts, with their scores.

    For one sampled completion of each prompt: its score by the rubric (``gold``) and by the reward model (``proxy``),
    and whether it is ``right``. ``greedy`` has the completions of greedy decoding, ``greedy_right`` whether those are
    right.
    """

    greedy: list[Group]
    gold: list[float]
    proxy: list[float]
    right: list[bool]
    greedy_right: list[bool]


def run_quickstart(
    output_dir: Path,
    seed: int = 0,
    *,
    size: QuickstartSize = FULL,
    max_steps: int = 100,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Run everything, write ``summary.json`` and the trained model into ``output_dir``, and return the summary.

    The rubric evaluates the trained model. Nothing was trained on the rubric directly: the reward model has only seen
    noisy preferences by it, on other requests. All figures are from the split "test", on which no setting was chosen.
    """
    console = console or Console()
    started = time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)  # the dashboard takes no folder that is not there
    _print_command(console, "To see it while it trains, in another terminal:", "dashboard", output_dir)
    start, accuracy = _build_start(output_dir, size, seed, console)
    console.print("[bold]2[/] Online DPO: sample, score with the reward model, train on the better and the worse")
    trainer = build_trainer(
        output_dir, start.policy_dir, start.reward_dir, start.prompts_train, seed, max_steps, callbacks
    )
    answers_of = _held_out_evaluation(start.reward_dir, start.prompts_test, trainer.tokenizer, trainer.args, seed)
    before = answers_of(AutoModelForCausalLM.from_pretrained(start.policy_dir))
    with trainer.recording.ending() as record_end:  # the evaluation is a part of the run
        training_seconds = _train_and_save(trainer)
        after = answers_of(trainer.model)  # pyright: ignore[reportArgumentType]
        metrics = trainer.evaluate(load_prompts(str(start.prompts_test), limit=PROMPTS_FOR_KL))
        record_end(0)

    summary = summarise(before, after) | {
        "against": "the starting policy",
        "scored_by": "the rubric",
        "reward_model_accuracy": accuracy,
        "kl": metrics["eval_objective/kl"],
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - started,
        "training_seconds": training_seconds,
        "tokens_per_second": _mean_of(trainer.state.log_history, "perf/tokens_per_second"),
    }
    summary_file = output_dir / "summary.json"
    summary_file.write_text(json.dumps(summary, indent=2) + "\n")
    report(console, before, after, summary)
    console.print(f"The trained model is in [bold]{output_dir}[/], the figures in {summary_file}.")
    for what, command, path in (
        ("To see what it was trained on:", "dashboard", output_dir),
        ("To make a page of it:", "report", output_dir),
        ("To run it with your own settings:", "train", output_dir / RUN_FILE.name),
    ):
        _print_command(console, what, command, path)
    return summary


def _print_command(console: Console, what: str, command: str, path: Path) -> None:
    """Print a command for the user in one line, however long the path is."""
    text = f"{what} online-dpo {command} {shlex.quote(str(path))}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _build_start(
    output_dir: Path, size: QuickstartSize, seed: int, console: Console
) -> tuple[QuickstartArtifacts, float]:
    """Create models, prompts and the run file, and measure the accuracy of the reward model."""
    console.print("[bold]1[/] Making a tokenizer, a policy and a reward model (a minute or two)")
    start = build(output_dir / "start", seed=seed, size=size)
    write_run_file(output_dir)
    model, tokenizer = load_reward_model(str(start.reward_dir))
    requests = sample_requests(size.prompts_test, seed, "test")
    accuracy = reward_model_accuracy(model, tokenizer, requests, seed)  # pyright: ignore[reportArgumentType]
    console.print(f"  Pairs that differ only in correctness: the reward model is right about {accuracy:.1%}")
    return start, accuracy


def build_trainer(
    output_dir: Path,
    policy_dir: Path,
    reward_dir: Path,
    prompts: Path,
    seed: int,
    max_steps: int,
    callbacks: Sequence[TrainerCallback],
) -> OnlineDPOTrainer:
    """Build the trainer of the quickstart, in the way a user would."""
    args = OnlineDPOConfig(
        **{**training_settings(), "output_dir": str(output_dir), "seed": seed, "max_steps": max_steps},
        use_cpu=True,
        disable_tqdm=True,
        run_folder=True,
    )
    trainer = OnlineDPOTrainer(
        model=str(policy_dir),
        reward_funcs=str(reward_dir),
        args=args,
        train_dataset=load_prompts(str(prompts)),
        processing_class=AutoTokenizer.from_pretrained(policy_dir),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train_and_save(trainer: OnlineDPOTrainer) -> float:
    """Trains, writes the model and its card, and returns the seconds of training alone."""
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model()
    trainer.create_model_card(model_name="quickstart")
    return seconds


def training_settings() -> dict[str, Any]:
    """The trainer's fields in the run file, without the paths of models and prompts, which this module sets."""
    fields = yaml.safe_load(RUN_FILE.read_text(encoding="utf-8"))
    return {name: value for name, value in fields.items() if name not in FIELDS_SET_HERE}


def write_run_file(output_dir: Path) -> Path:
    """Write ``run.yaml`` into the folder of a quickstart, with which ``online-dpo train`` repeats the run.

    Its first line names a schema for editors, which is copied next to it: a path into the package would depend on the
    environment, and a web address would need the network.
    """
    file = output_dir / "run.yaml"
    text = RUN_FILE.read_text(encoding="utf-8").replace(f"../{SCHEMA.name}", SCHEMA.name)
    file.write_text(text.replace(str(DEFAULT_OUTPUT), str(output_dir)), encoding="utf-8")
    shutil.copyfile(SCHEMA, output_dir / SCHEMA.name)
    return file


def summarise(before: PolicyAnswers, after: PolicyAnswers) -> dict[str, Any]:
    """Compute the figures of both policies.

    They are the shares of right answers, sampled and greedy, the win rate of after against before by the rubric (a tie
    counts half), and the mean scores. Shares have Wilson intervals.
    """
    wins = [preference_by_score(*gold_scores) for gold_scores in zip(after.gold, before.gold, strict=True)]
    shares = {
        "accuracy_before": before.right,
        "accuracy_after": after.right,
        "greedy_accuracy_before": before.greedy_right,
        "greedy_accuracy_after": after.greedy_right,
        "win_rate": wins,
    }
    summary: dict[str, Any] = {"prompts": len(wins)}
    for name, outcomes in shares.items():
        summary[name], *summary[f"{name}_ci95"] = win_rate([float(outcome) for outcome in outcomes])
    return summary | {
        "gold_before": statistics.fmean(before.gold),
        "gold_after": statistics.fmean(after.gold),
        "proxy_before": statistics.fmean(before.proxy),
        "proxy_after": statistics.fmean(after.proxy),
    }


def report(console: Console, before: PolicyAnswers, after: PolicyAnswers, summary: dict[str, Any]) -> None:
    """Print the first three test prompts with both greedy answers and their rubric scores, and the table of figures."""
    console.print("\nThe first three held-out prompts, with the most probable answers and the rubric's points:")
    for old, new in islice(zip(before.greedy, after.greedy, strict=True), 3):
        console.print(f"\n[bold]{old.prompt.content}[/]", highlight=False)
        for when, group in (("before", old), ("after ", new)):
            prompt, answer = _texts(group)
            console.print(f"  {when} ({rubric(prompt, answer):+.1f}):{answer}", highlight=False, markup=False)
    console.print(_table(summary))
    console.print(
        f"Win rate {_percent(summary, 'win_rate')} against the starting policy by the rubric, at a KL of "
        f"{summary['kl']:.1f} nats. {summary['steps']} steps, {summary['seconds']:.0f} s."
    )
    low, high = summary["win_rate_ci95"]
    interval = {"value": summary["win_rate"], "low": low, "high": high}
    console.print(
        comparison_conclusion("The trained policy", "the one it started as", len(before.gold), interval, None)
    )


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"\n{summary['prompts']} held-out prompts (95 % intervals)", title_justify="left")
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    for label, name in (("right answers, sampled", "accuracy"), ("right answers, greedy", "greedy_accuracy")):
        table.add_row(label, *(_percent(summary, f"{name}_{when}") for when in ("before", "after")))
    for label, name in (("rubric (gold)", "gold"), ("reward model (proxy)", "proxy")):
        table.add_row(label, *(f"{summary[f'{name}_{when}']:.2f}" for when in ("before", "after")))
    return table


def _percent(summary: dict[str, Any], name: str) -> str:
    low, high = summary[f"{name}_ci95"]
    return f"{summary[name]:.1%} ({low:.1%} to {high:.1%})"


def _held_out_evaluation(
    reward_dir: Path, prompts_file: Path, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig, seed: int
) -> Callable[[PreTrainedModel], PolicyAnswers]:
    """A function that samples and scores a policy's answers, with the same random numbers for every policy."""
    reward_model, reward_tokenizer = load_reward_model(str(reward_dir))
    scorer = RewardModelScorer(reward_model, reward_tokenizer)
    prompts = _prompts(prompts_file, tokenizer, args)
    params = SamplingParams.from_config(args, (tokenizer.eos_token_id,))  # pyright: ignore[reportArgumentType]

    def evaluate(policy: PreTrainedModel) -> PolicyAnswers:
        engine = TransformersEngine(policy, tokenizer, batch_size=128)
        key = RolloutKey(seed, 0, Stream.HELD_OUT)
        groups = engine.generate(prompts, 1, params, key)
        greedy = engine.generate(prompts, 1, replace(params, top_k=1), key)
        proxy = [values[0] for values in scorer.score(groups)]
        return PolicyAnswers(
            greedy=greedy,
            gold=[rubric(*texts) for texts in map(_texts, groups)],
            proxy=[float(value) for value in proxy if value is not None],
            right=[is_right(*texts) for texts in map(_texts, groups)],
            greedy_right=[is_right(*texts) for texts in map(_texts, greedy)],
        )

    return evaluate


def _texts(group: Group) -> tuple[str, str]:
    """The prompt and the first completion."""
    return str(group.prompt.content), group.completions[0].text


def _prompts(file: Path, tokenizer: PreTrainedTokenizerBase, args: OnlineDPOConfig) -> list[Prompt]:
    dataset, _ = prepare_prompts(load_prompts(str(file)), tokenizer, args, name="prompts_test")
    assert isinstance(dataset, Dataset)
    return prompts_from_batch(dataset[:])


def _mean_of(log_history: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(log[name] for log in log_history if name in log)
