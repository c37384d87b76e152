"""Reads a run file and the overrides on the command line, and checks all that can be checked without torch.

All problems are collected before they are reported, each with its file and line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from online_dpo.checkpoints.choice import AUTO, newest_whole, none_found, problem_of_named
from online_dpo.checkpoints.needed import Needs
from online_dpo.cli.judging.plan import BuiltInJudge, plan_built_in
from online_dpo.cli.runfile.data_fields import data_problems
from online_dpo.cli.runfile.entries import COMMAND_LINE, Entry, UsageError, read_overrides, read_run_file, read_values
from online_dpo.cli.runfile.model_options import ignored_options, model_init_kwargs, model_problems
from online_dpo.cli.runfile.paths import exists, looks_like_path, output_problem, path_problem
from online_dpo.cli.runfile.plugins import FIELD, Plugin, Plugins, RegisteredName, are_given, checked_later
from online_dpo.cli.runfile.ray_section import read_section
from online_dpo.cli.runfile.references import Reference, parse_module, parse_reference
from online_dpo.cli.runfile.run_config import COUNTS, RunConfig
from online_dpo.cli.runfile.schema import load_fields
from online_dpo.config import requirements
from online_dpo.config.feedback import HUMAN
from online_dpo.config.hf_ranges import absurd, out_of_range, shown
from online_dpo.config.input import MAPPINGS, mapping_from_text
from online_dpo.config.llm_judge import LLM
from online_dpo.config.model_folder import Role, folder_problem
from online_dpo.config.registry import KINDS
from online_dpo.config.sharding import Asked, ShardingError, asked_sharding
from online_dpo.distributed.processes import started_together
from online_dpo.launch.settings import RaySettings

MODEL_FILES = ("config.json", "adapter_config.json")
INPUT_PATHS = (
    "model_name_or_path",
    "ref_model_name_or_path",
    "reward_model_path",
    "eval_reward_model_path",
    "dataset_name",
    "eval_dataset_name",
)
ROLES: dict[str, Role] = {
    "model_name_or_path": "policy",
    "ref_model_name_or_path": "reference",
    "reward_model_path": "reward",
    "eval_reward_model_path": "reward",
}
"""What the model of a field is to do."""
OPTION_FILES = ("fsdp_config", "deepspeed")
"""Fields that hold options, or the path of a file with them."""
JSON_TEXTS = (*MAPPINGS, "gradient_checkpointing_kwargs", "lr_scheduler_kwargs")
"""Mappings that may also be written as JSON text."""
DEFAULT_OUTPUT = "trainer_output"
REWARDS = ("reward_funcs", "reward_model_path")
SCORERS = (*REWARDS, "judge")
JUDGES = ("judge", "eval_judge")
OF_ADAPTERS = ("use_rslora", "use_dora")
GOLD_REWARDS = ("eval_reward_funcs", "eval_reward_model_path")


@dataclass(frozen=True)
class RunPlan:
    """A checked run: the fields of `RunConfig`, the given training arguments, and references to the user's code."""

    run: RunConfig
    training: dict[str, Any]
    reward_funcs: tuple[Reference | RegisteredName, ...]
    judge: Reference | RegisteredName | BuiltInJudge | None
    eval_reward_funcs: tuple[Reference | RegisteredName, ...]
    eval_judge: Reference | RegisteredName | BuiltInJudge | None
    plugins: Plugins
    warnings: tuple[str, ...]
    ray: RaySettings
    sharding: Asked | None = None


def plan_run(run_file: Path | None, override_words: Sequence[str], on_cluster: bool = False) -> RunPlan:
    """Check a run file and its overrides, and return the plan of the run.

    Args:
        on_cluster: the run is to be started as its section `ray` says, not as the process that plans it.

    Raises:
        UsageError: something is wrong; it lists every problem.
    """
    problems: list[str] = []
    entries = read_run_file(run_file, problems) if run_file else {}
    entries |= read_overrides(override_words, problems)
    entries, settings = read_section(entries, str(run_file or COMMAND_LINE), on_cluster, problems)
    specs = checked_later(load_fields()) if are_given(entries) else load_fields()
    values = read_values(entries, specs, problems, help_command="online-dpo train --help")
    checker = RunChecker(entries, values, run_file, settings.trainers if on_cluster else None)
    problems.extend(checker.problems())
    if problems:
        raise UsageError(problems)
    return _plan(checker, settings)


def _plan(checker: RunChecker, settings: RaySettings) -> RunPlan:
    values, own = checker.values, {field.name for field in fields(RunConfig)}
    if options := model_init_kwargs(values):
        values["model_init_kwargs"] = options
    return RunPlan(
        run=RunConfig(**{name: value for name, value in values.items() if name in own}),
        training={name: value for name, value in values.items() if name not in own},
        reward_funcs=tuple(checker.references.get("reward_funcs", ())),
        judge=checker.judges.get("judge"),
        eval_reward_funcs=tuple(checker.references.get("eval_reward_funcs", ())),
        eval_judge=checker.judges.get("eval_judge"),
        plugins=checker.plugins(),
        warnings=tuple(checker.warnings()),
        ray=settings,
        sharding=checker.sharding,
    )


class RunChecker:
    """Checks of a run that need several fields or the disk. Local paths in ``values`` are completed.

    ``processes`` is the number of those that will train, where this process is not one of them.
    """

    def __init__(
        self, entries: dict[str, Entry], values: dict[str, Any], run_file: Path | None, processes: int | None = None
    ) -> None:
        self._processes = processes
        self.entries = entries
        self.values = values
        self.file = str(run_file) if run_file else COMMAND_LINE
        self.file_folder = run_file.parent if run_file else None
        self.references: dict[str, list[Reference | RegisteredName]] = {}
        self.judges: dict[str, Reference | RegisteredName | BuiltInJudge] = {}
        self.modules: list[Plugin] = []
        self.sharding: Asked | None = None

    def problems(self) -> Iterator[str]:
        """Check everything and yield one line for each problem."""
        yield from self._missing()
        yield from self._mappings()
        yield from self._plugins()
        for name in INPUT_PATHS:
            if self._given(name):
                yield from self._input_path(name)
        yield from self._scorers()
        options = (*model_problems(self.values, is_trained=True), *self._numbers().items(), *data_problems(self.values))
        for name, problem in options:
            yield f"{self._where(name)}: `{name}` {problem}"
        yield from self._output()
        yield from self._resume()
        yield from self._evaluation()
        if self.values.get("dataset_streaming") and (self.values.get("max_steps") or 0) < 1:
            where = self._where("dataset_streaming")
            yield f"{where}: `dataset_streaming` needs `max_steps`: a stream has no known length."
        for name, problem in requirements.problems(self.values):
            yield f"{self._where(name)}: {problem}"
        yield from self._sharding()

    def _sharding(self) -> Iterator[str]:
        """Complete the paths of files with options of sharding, and check how the run shards its policy."""
        for name in OPTION_FILES:
            text = self.values.get(name)
            if isinstance(text, str) and not text.lstrip().startswith("{"):
                paths = [folder / Path(os.path.expanduser(text)) for folder in self._folders(name)]
                self.values[name] = str(next((path for path in paths if path.is_file()), text))
        try:
            self.sharding = asked_sharding(self.values, processes=self._processes)
        except ShardingError as error:
            where = self.file if error.field not in self.entries else self._where(error.field)
            yield f"{where}: {error}" if error.field else str(error)

    def _numbers(self) -> dict[str, str]:
        """What is wrong with numbers, by field: one problem each."""
        problems = {**dict(absurd(self.values)), **dict(out_of_range(self.values))}
        for name in COUNTS:
            if self._given(name) and self.values[name] < 1:
                problems[name] = f"is {shown(self.values[name])}; wanted: 1 or more."
        return problems

    def warnings(self) -> Iterator[str]:
        """Yield a line for each field that is ignored or likely to be a mistake."""
        for name in self.values:
            if (name.startswith("lora_") or name in OF_ADAPTERS) and not self.values.get("use_peft"):
                yield f"{self._where(name)}: `{name}` is ignored without `use_peft`."
        for name in ignored_options(self.values):
            yield f"{self._where(name)}: `{name}` is ignored without `load_in_4bit`."
        name, split = self.values["dataset_name"], self.values.get("dataset_test_split") or ""
        if split and "[" not in split and not self._given("eval_dataset_name") and Path(name).is_file():
            yield (
                f"{self._where('dataset_test_split')}: {name} is one file, whose rows are of every split: evaluations "
                "use prompts that are trained on. Give `eval_dataset_name`, or slices such as `train[:90%]`."
            )
        for name in JUDGES:
            if self._given(f"{name}_kwargs") and not isinstance(self.judges.get(name), BuiltInJudge):
                where = self._where(f"{name}_kwargs")
                yield f"{where}: `{name}_kwargs` is ignored: only `llm` and pairwise models take them."

    def _given(self, name: str) -> bool:
        return self.values.get(name) not in (None, [])

    def _where(self, name: str) -> str:
        return self.entries[name].where

    def _mappings(self) -> Iterator[str]:
        """Convert mappings that are written as JSON text, and remove values that are not mappings."""
        for name in JSON_TEXTS:
            value = self.values.get(name)
            if isinstance(value, str):
                try:
                    self.values[name] = mapping_from_text(name, value)
                except ValueError as problem:
                    del self.values[name]
                    yield f"{self._where(name)}: {problem}"

    def _missing(self) -> Iterator[str]:
        for name, what in [("model_name_or_path", "the model to train"), ("dataset_name", "the prompts")]:
            if name not in self.entries:
                yield f"{self.file}: `{name}` is missing: {what}."
        # a scorer with a wrong value has been reported already: one problem is enough
        if all(name not in self.entries or self.values.get(name, name) in (None, []) for name in SCORERS):
            names = ", ".join(f"`{name}`" for name in SCORERS)
            yield f"{self.file}: nothing scores the completions. Give one of {names}."

    def _scorers(self) -> Iterator[str]:
        for name in ("reward_funcs", "eval_reward_funcs"):
            if self._given(name):
                yield from self._references(name)
        for name in JUDGES:
            yield from self.judge_problems(name)
        if self._given("judge_top"):
            for names, what in ((REWARDS, "reward"), (("judge",), "judge")):
                if not any(self._given(name) for name in names):
                    yield (
                        f"{self._where('judge_top')}: `judge_top` shows a judge the best completions by a reward, "
                        f"and there is no {what}. Give {' or '.join(f'`{name}`' for name in names)}."
                    )
        gold = [name for name in (*GOLD_REWARDS, "eval_judge") if self._given(name)]
        if "eval_judge" in gold and len(gold) > 1:
            yield f"{self._where('eval_judge')}: `eval_judge` is given beside `{gold[0]}`. Give one of them."

    def judge_problems(self, name: str) -> Iterator[str]:
        """Check ``judge`` or ``eval_judge``; yield its problems, or add it to ``judges``."""
        if self._given(name):
            yield from self._judge(name)

    def _folders(self, name: str) -> list[Path]:
        """Folders in which relative paths of a field are searched; for a field of the run file, its folder first."""
        of_file = [self.file_folder] if self.file_folder and self.entries[name].words is None else []
        return [*of_file, Path()]

    def _input_path(self, name: str) -> Iterator[str]:
        given = self.values[name]
        if problem := path_problem(given):
            yield f"{self._where(name)}: `{name}` {problem}"
            return
        if "$" in given:
            yield (
                f"{self._where(name)}: `{name}` is {given!r}: environment variables are not filled in here. Give "
                f"--{name} on the command line, where the shell does."
            )
            return
        candidates = [folder / Path(os.path.expanduser(given)) for folder in self._folders(name)]
        existing = next((path for path in candidates if exists(path)), None)
        if existing is not None:
            self.values[name] = str(existing)
            if "model" in name and not holds_model(existing):
                files = " or ".join(MODEL_FILES)
                yield f"{self._where(name)}: `{name}`: {existing} is no model folder: it holds no {files}."
            elif problem := requirements.adapter_problem(str(existing)) or self._folder_problem(name, existing):
                yield f"{self._where(name)}: `{name}`: {problem}"
        elif looks_like_path(given):
            places = " or ".join(dict.fromkeys(map(str, candidates)))
            what = "a folder, or a name on the hub" if "model" in name else "a file or folder, or a name on the hub"
            yield f"{self._where(name)}: `{name}` is {given!r}, but there is no {places}. Give {what}."

    def _folder_problem(self, name: str, folder: Path) -> str | None:
        options = self.values.get("model_init_kwargs")
        own = options if ROLES.get(name) in ("policy", "reference") and isinstance(options, dict) else None
        return folder_problem(str(folder), ROLES[name], own) if name in ROLES else None

    def plugins(self) -> Plugins:
        """The plugins, with the names that are checked after they have been imported."""
        if not self.modules:
            return Plugins()
        names = [reference for references in self.references.values() for reference in references]
        return Plugins(
            tuple(self.modules),
            {name: entry for name, entry in self.entries.items() if name in KINDS},
            load_fields(),
            tuple(name for name in names if isinstance(name, RegisteredName)),
        )

    def _plugins(self) -> Iterator[str]:
        for text in self.values.get(FIELD) or []:
            try:
                self.modules.append(Plugin(self._where(FIELD), parse_module(text, self._folders(FIELD))))
            except ValueError as problem:
                yield f"{self._where(FIELD)}: `{FIELD}` {text!r}: {problem}."

    def _references(self, name: str) -> Iterator[str]:
        texts = self.values[name] if isinstance(self.values[name], list) else [self.values[name]]
        self.references[name] = []
        for text in texts:
            if self._may_be_registered(text):
                kind = "judge" if name in JUDGES else "reward"
                self.references[name].append(RegisteredName(self._where(name), name, kind, text))
                continue
            try:
                self.references[name].append(parse_reference(text, self._folders(name)))
            except ValueError as problem:
                yield f"{self._where(name)}: `{name}` {text!r}: {problem}."

    def _may_be_registered(self, text: str) -> bool:
        """Whether a text may be a name that a plugin registers: it is neither a path nor of the form `file.py:name`."""
        return bool(self._given(FIELD)) and ":" not in text and "/" not in text and not text.endswith(".py")

    def _judge(self, name: str) -> Iterator[str]:
        text, options = self.values[name], self.values.get(f"{name}_kwargs") or {}
        folders = self._folders(name)
        candidates = [folder / Path(os.path.expanduser(text)) for folder in folders]
        model = next((path for path in candidates if path.is_dir() and text not in (LLM, HUMAN)), None)
        if text not in (LLM, HUMAN) and model is None:
            if ":" not in text and not self._may_be_registered(text):
                places = " or ".join(dict.fromkeys(map(str, candidates)))
                yield (
                    f"{self._where(name)}: `{name}` is {text!r}, but there is no folder {places}. Give `llm`, "
                    "`human`, the folder of a pairwise model on this disk, `file.py:name` or `package.module:name`."
                )
                return
            yield from self._references(name)
            if self.references[name]:
                [self.judges[name]] = self.references[name]
            return
        if f"{name}_kwargs" in self.entries and f"{name}_kwargs" not in self.values:
            return  # they are not a mapping, which has been reported
        where = self._where(f"{name}_kwargs" if options else name)
        try:
            self.judges[name] = plan_built_in(text, model, options, folders)
        except ValueError as problem:
            yield f"{where}: `{name}: {text}`: {problem}"

    def _output(self) -> Iterator[str]:
        given = self.values.get("output_dir")
        read = [(name, self.values[name]) for name in INPUT_PATHS if self._given(name)]
        if given is not None and (problem := output_problem(given, read)):
            yield f"{self._where('output_dir')}: `output_dir` {problem}"

    def _resume(self) -> Iterator[str]:
        checkpoint = self.values.get("resume_from_checkpoint")
        if not checkpoint or os.environ.get("RANK", "0") != "0":  # the first process reads it for all
            return
        where = f"{self._where('resume_from_checkpoint')}: `resume_from_checkpoint`"
        started = started_together()
        needs = Needs(self.values, self._processes or (1 if started is None else started.count))
        if checkpoint is True or checkpoint == AUTO:
            output = Path(os.path.expanduser(self.values.get("output_dir") or DEFAULT_OUTPUT))
            choice = newest_whole(output, needs)
            if choice.folder is None and (checkpoint is True or choice.passed_over):
                yield f"{where}: {none_found(output, choice)}"
        elif problem := path_problem(checkpoint) or problem_of_named(Path(os.path.expanduser(checkpoint)), needs):
            yield f"{where}: {problem}"

    def _evaluation(self) -> Iterator[str]:
        wanted = self.values.get("eval_strategy", "no") != "no" or self.values.get("eval_on_start")
        if wanted and not (self._given("dataset_test_split") or self._given("eval_dataset_name")):
            name = "eval_strategy" if "eval_strategy" in self.values else "eval_on_start"
            where = self._where(name)
            yield f"{where}: `{name}` needs prompts to evaluate on. Give `dataset_test_split` or `eval_dataset_name`."
        if self.values.get("overoptimisation") == "stop" and self.values.get("eval_strategy", "no") == "no":
            where = self._where("overoptimisation")
            yield f"{where}: `overoptimisation: stop` compares evaluations. Give `eval_strategy` and `eval_steps`."


def judge_of_run(path: Path) -> BuiltInJudge:
    """Read the judge of a run file.

    Raises:
        UsageError: the file cannot be read, or its judge is not one of this package.
    """
    problems: list[str] = []
    entries = {
        name: entry for name, entry in read_run_file(path, problems).items() if name in ("judge", "judge_kwargs")
    }
    checker = RunChecker(entries, read_values(entries, load_fields(), problems, "online-dpo train --help"), path)
    problems += [*checker.judge_problems("judge")]
    judge = checker.judges.get("judge")
    if not problems and (not isinstance(judge, BuiltInJudge) or judge.human):
        problems.append(f"{path}: wanted: `judge: llm`, or `judge` with the folder of a pairwise model.")
    if problems:
        raise UsageError(problems)
    assert isinstance(judge, BuiltInJudge)
    return judge


def holds_model(folder: Path) -> bool:
    """Whether a folder contains a model or an adapter."""
    return any((folder / name).is_file() for name in MODEL_FILES)
