"""The plan of ``online-dpo eval``, made from a run file and the command line, and checked without importing torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from online_dpo.checkpoints.folders import checkpoints_in
from online_dpo.checkpoints.manifest import model_problem_of
from online_dpo.cli.evaluation.options import CALLED_HERE, FROM_THE_RUN, RUN_FIELDS, EvalConfig
from online_dpo.cli.judging.plan import BuiltInJudge
from online_dpo.cli.runfile.data_fields import data_problems
from online_dpo.cli.runfile.entries import Entry, UsageError, read_overrides, read_run_file, read_values
from online_dpo.cli.runfile.model_options import OF_4BIT, QUANTISATION, model_init_kwargs, model_problems
from online_dpo.cli.runfile.paths import looks_like_path, path_problem, same_file
from online_dpo.cli.runfile.plugins import Plugins, RegisteredName, are_given, checked_later
from online_dpo.cli.runfile.references import Reference, parse_reference
from online_dpo.cli.runfile.run_file import GOLD_REWARDS, MODEL_FILES, RunChecker, holds_model
from online_dpo.cli.runfile.schema import FieldSpec, load_fields, read_fields_of
from online_dpo.config import requirements
from online_dpo.config.feedback import HUMAN
from online_dpo.config.hf_ranges import LARGEST

HELP = "online-dpo eval --help"
NO_ARGUMENTS = (
    *("judge", "judge_kwargs", "dataset_config", "dataset_test_split", "dataset_types", "dtype", "attn_implementation"),
    *(*QUANTISATION, *OF_4BIT, "plugins"),
)
OF_TRAINING = ("reward_weights", "missing_eos_penalty", "length_penalty")
"""Fields that are part of the training score: used with the run's own scorers, or if the command line gives them."""


@dataclass(frozen=True)
class PromptSet:
    """Where the prompts come from: arguments of `load_prompts`."""

    source: str
    split: str
    config: str | None
    limit: int | None
    types: dict[str, str] | None


@dataclass(frozen=True)
class EvalPlan:
    """A checked evaluation.

    ``rewards`` are functions and names of reward models, empty with a judge. ``trained_on``: the scorer is the one that
    the run was trained on. ``training`` has the given fields of :class:`online_dpo.OnlineDPOConfig`.
    """

    model: str
    against: str
    prompts: PromptSet
    rewards: tuple[Reference | RegisteredName | str, ...]
    judge: Reference | RegisteredName | BuiltInJudge | None
    plugins: Plugins
    trained_on: bool
    training: dict[str, Any]
    options: EvalConfig


def own_fields() -> dict[str, FieldSpec]:
    """The fields of `EvalConfig` by name."""
    return read_fields_of("online_dpo.cli.evaluation.options", "EvalConfig", group="Evaluation")


def plan_eval(run_file: Path | None, words: Sequence[str]) -> EvalPlan:
    """Check the arguments of an evaluation and return its plan.

    Raises:
        UsageError: something is wrong; it lists every problem.
    """
    problems: list[str] = []
    entries = read_run_file(run_file, problems) if run_file else {}
    given = read_overrides(words, problems)
    known = checked_later(load_fields()) if are_given({**entries, **given}) else load_fields()
    for name in [name for name in given if name in FROM_THE_RUN]:
        hint = f"Here it is `{CALLED_HERE[name]}`." if name in CALLED_HERE else f"See: {HELP}"
        problems.append(f"{given.pop(name).where}: `{name}` is read from the run file alone. {hint}")
    specs = {**own_fields(), **{name: known[name] for name in RUN_FIELDS}}
    values = read_values(entries, known, problems, help_command="online-dpo train --help")
    values |= read_values(given, specs, problems, help_command=HELP, called_here=CALLED_HERE)
    checker = EvalChecker(entries, given, values, run_file)
    problems.extend(checker.problems())
    if problems:
        raise UsageError(problems)
    return checker.plan()


class EvalChecker(RunChecker):
    """Checks the arguments of an evaluation. Fields of the run file that it does not read are not checked."""

    def __init__(
        self, in_file: dict[str, Entry], given: dict[str, Entry], values: dict[str, Any], run_file: Path | None
    ) -> None:
        super().__init__({**in_file, **given}, values, run_file)
        self.given = given
        judge_is_new = "judge" in given and ("judge" not in in_file or in_file["judge"].value != values.get("judge"))
        if judge_is_new and "judge_kwargs" not in given:
            values.pop("judge_kwargs", None)  # those of another judge
        self.rewards: list[Reference | RegisteredName | str] = []
        self.scored_by = ""
        self.model = self.against = ""
        self.prompts: PromptSet | None = None

    def problems(self) -> Iterator[str]:
        """Check everything and yield one line for each problem."""
        yield from self._mappings()
        yield from self._plugins()
        yield from self._scoring()
        yield from self._models()
        yield from self._prompts()
        for name, problem in (*model_problems(self.values, is_trained=False), *data_problems(self.values)):
            yield f"{self._where(name)}: `{name}` {problem}"
        read = {name: self.values[name] for name in RUN_FIELDS if name in self.values}
        for name, problem in requirements.problems(read):
            yield f"{self._where(name)}: {problem}"
        for name in ("limit", "samples"):
            if self._given(name) and self.values[name] < 1:
                yield f"{self._where(name)}: `{name}` is {self.values[name]}; wanted: 1 or more."
        if self._given("samples") and self.values["samples"] > LARGEST["num_completions"]:
            yield f"{self._where('samples')}: `samples` is above {LARGEST['num_completions']:,}."
        if self.values.get("greedy") and self.values.get("samples", 1) > 1:
            yield f"{self._where('samples')}: `samples` is above 1, but with `greedy` all answers are the same."
        yield from self._files()

    def _files(self) -> Iterator[str]:
        given = [name for name in ("json", "output") if self._given(name)]
        written = [Path(os.path.expanduser(self.values[name])).absolute() for name in given]
        if len(written) == 2 and written[0] == written[1]:
            yield f"{self._where('output')}: `output` is the file of `json`. Give another one."
        for name, path in zip(given, written, strict=True):
            if self.prompts is not None and same_file(path, Path(os.path.expanduser(self.prompts.source))):
                yield f"{self._where(name)}: `{name}` is the file of the prompts. Give another one."
        for name in ("json", "output"):
            if self._given(name) and not Path(os.path.expanduser(self.values[name])).absolute().parent.is_dir():
                yield f"{self._where(name)}: `{name}`: there is no folder {Path(self.values[name]).parent}."
            elif self._given(name) and Path(os.path.expanduser(self.values[name])).is_dir():
                yield f"{self._where(name)}: `{name}`: {self.values[name]} is a folder. Give the name of a file."

    def plan(self) -> EvalPlan:
        """The plan, once `problems` has found none."""
        assert self.prompts is not None
        own = {field.name for field in fields(EvalConfig)}
        trained_on = self.scored_by in ("reward_funcs", "judge") and self.scored_by not in self.given
        revision_of_run = "model" not in self.given and "against" not in self.given
        if options := model_init_kwargs(self.values, without=() if revision_of_run else ("model_revision",)):
            self.values["model_init_kwargs"] = options
        dropped = () if trained_on else tuple(name for name in OF_TRAINING if name not in self.given)
        return EvalPlan(
            model=self.model,
            against=self.against,
            prompts=self.prompts,
            rewards=tuple(self.rewards),
            judge=self.judges.get(self.scored_by),
            plugins=self.plugins(),
            trained_on=trained_on,
            training={
                name: self.values[name]
                for name in RUN_FIELDS
                if name in self.values and name not in NO_ARGUMENTS and name not in dropped
            },
            options=EvalConfig(**{name: value for name, value in self.values.items() if name in own}),
        )

    # --- scorers ----------------------------------------------------------------------------------------------------

    def _scoring(self) -> Iterator[str]:
        """Choose the scorer: that of the command line, else the run's gold scorer, else the one it was trained on.

        If a judge chose among the completions with the best rewards (`judge_top`), it is the judge.
        """
        if "reward" in self.given and "judge" in self.given:
            yield f"{self._where('judge')}: `judge` is given beside `reward`. Give one of them."
        elif "reward" in self.given:
            self.scored_by = "reward"
            yield from self._rewards("reward")
        elif "judge" in self.given:
            yield from self._judged_by("judge")
        elif any(self._given(name) for name in GOLD_REWARDS):
            yield from self._rewards_of_run(*GOLD_REWARDS)
        elif self._given("eval_judge"):
            yield from self._judged_by("eval_judge")
        elif self._given("judge") and self._given("judge_top"):
            yield from self._judged_by("judge")
        elif self._given("reward_funcs") or self._given("reward_model_path"):
            yield from self._rewards_of_run("reward_funcs", "reward_model_path")
        elif self._given("judge"):
            yield from self._judged_by("judge")
        else:
            yield f"{self.file}: nothing scores the answers. Give --reward or --judge."

    def _judged_by(self, name: str) -> Iterator[str]:
        self.scored_by = name
        if self.values.get(name) == HUMAN:
            yield f"{self._where(name)}: people are asked in training alone. Give another --judge or --reward."
        elif self._given(name):
            yield from self._judge(name)

    def _rewards_of_run(self, functions: str, model: str) -> Iterator[str]:
        self.scored_by = functions
        if self._given(functions):
            yield from self._references(functions)
            self.rewards += self.references[functions]
        if self._given(model):
            yield from self._input_path(model)
            self.rewards.append(self.values[model])

    def _rewards(self, name: str) -> Iterator[str]:
        for text in self.values.get(name) or []:
            if ":" in text:
                try:
                    self.rewards.append(parse_reference(text, [Path()]))
                except ValueError as problem:
                    yield f"{self._where(name)}: `{name}` {text!r}: {problem}."
            else:
                yield from self._model_folder(name, text)
                self.rewards.append(text)

    # --- models -----------------------------------------------------------------------------------------------------

    def _models(self) -> Iterator[str]:
        """Choose both models."""
        if self._given("model"):
            self.model = self.values["model"]
            yield from self._model_folder("model", self.model)
        elif self._given("output_dir"):
            self.model = self.values["output_dir"]
            yield from self._output_folder(Path(os.path.expanduser(self.model)))
        else:
            yield f"{self.file}: `model` is missing: the model to evaluate. Give --model."
        if self._given("against"):
            self.against = self.values["against"]
            yield from self._model_folder("against", self.against)
            return
        name = next((n for n in ("ref_model_name_or_path", "model_name_or_path") if self._given(n)), None)
        if name is None:
            yield f"{self.file}: `against` is missing: the model to compare with. Give --against."
            return
        yield from self._input_path(name)
        self.against = self.values[name]

    def _output_folder(self, folder: Path) -> Iterator[str]:
        if not holds_model(folder):
            checkpoints = checkpoints_in(folder)
            example = f", such as --model {checkpoints[-1]}" if checkpoints else ""
            yield f"{self.file}: {folder}, the run's `output_dir`, holds no model. Give --model{example}."

    def _model_folder(self, name: str, text: str) -> Iterator[str]:
        path = Path(os.path.expanduser(text))
        if problem := path_problem(text):
            yield f"{self._where(name)}: `{name}` {problem}"
        elif path.is_dir():
            if not holds_model(path):
                files = " or ".join(MODEL_FILES)
                yield f"{self._where(name)}: `{name}`: {text} is no model folder: it holds no {files}."
            elif (problem := model_problem_of(path)) or (problem := model_problem_of(path)):
                yield f"{self._where(name)}: `{name}`: {text} is a damaged checkpoint: {problem}."
            elif problem := requirements.adapter_problem(text):
                yield f"{self._where(name)}: `{name}`: {problem}"
        elif looks_like_path(text) or path.parent != Path() and path.parent.is_dir():
            yield f"{self._where(name)}: `{name}`: there is no folder {text}."

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _prompts(self) -> Iterator[str]:
        """Choose the prompts: those of the command line, else the run's evaluation prompts."""
        split, config = self.values.get("dataset_test_split"), self.values.get("dataset_config")
        if self._given("prompts"):
            name = "prompts"
            split = split if "dataset_test_split" in self.given else "train"
            config = config if "dataset_config" in self.given else None
        elif self._given("eval_dataset_name"):
            name, config = "eval_dataset_name", None
        elif self._given("dataset_name") and split is not None:
            name = "dataset_name"
        else:
            of_run = (
                " The run file names none (`eval_dataset_name` or `dataset_test_split`)." if self.file_folder else ""
            )
            yield f"{self.file}: `prompts` is missing: prompts that were not trained on.{of_run} Give --prompts."
            return
        yield from self._input_path(name)
        limit = self.values.get("limit") or self.values.get("eval_limit")
        self.prompts = PromptSet(self.values[name], split or "train", config, limit, self.values.get("dataset_types"))
