"""The settings of a checked run as a run file of their own, which repeats it from any working folder.

Heavy packages must not be imported here.
"""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from online_dpo.cli.judging.plan import FILES, BuiltInJudge
from online_dpo.cli.runfile.model_options import model_init_kwargs
from online_dpo.cli.runfile.plugins import FIELD, RegisteredName
from online_dpo.cli.runfile.references import ModuleReference, Reference
from online_dpo.cli.runfile.run_config import RunConfig
from online_dpo.cli.runfile.run_file import INPUT_PATHS, OPTION_FILES, RunPlan

NOT_REPEATED = ("resume_from_checkpoint", "overwrite_output_dir", "hub_token")
"""Fields of one start of a run, not of the run."""


def resolved_settings(plan: RunPlan) -> dict[str, Any]:
    """Returns the fields that were given, those of the run first: paths are absolute, and files of the user's code are
    named by theirs.
    """
    own = {field.name: getattr(plan.run, field.name) for field in fields(RunConfig)}
    usual = {field.name: field.default for field in fields(RunConfig)}
    given = {name: value for name, value in own.items() if usual[name] is MISSING or value != usual[name]}
    given |= {name: value for name, value in plan.training.items() if name not in NOT_REPEATED and value is not None}
    made = model_init_kwargs({name: value for name, value in given.items() if name != "model_init_kwargs"})
    options = {k: v for k, v in (given.pop("model_init_kwargs", None) or {}).items() if k not in made}
    given |= {"model_init_kwargs": options} if options else {}
    for name in (*INPUT_PATHS, *OPTION_FILES):
        if isinstance(given.get(name), str) and os.path.exists(given[name]):
            given[name] = os.path.abspath(given[name])
    if given.get("output_dir"):
        given["output_dir"] = os.path.abspath(os.path.expanduser(given["output_dir"]))
    return given | _code(plan, given)


def _code(plan: RunPlan, given: dict[str, Any]) -> dict[str, Any]:
    """Rewards, judges and plugins."""
    found: dict[str, Any] = {
        "reward_funcs": [_named(one) for one in plan.reward_funcs],
        "eval_reward_funcs": [_named(one) for one in plan.eval_reward_funcs],
        FIELD: [_file_or_module(one.module) for one in plan.plugins.modules],
    }
    for name, judge in {"judge": plan.judge, "eval_judge": plan.eval_judge}.items():
        if isinstance(judge, BuiltInJudge):
            found[name] = given[name] if judge.folder is None else os.path.abspath(judge.folder)
            found[f"{name}_kwargs"] = {option: _path(option, value) for option, value in judge.options.items()}
        elif judge is not None:
            found[name] = _named(judge)
    return {name: value for name, value in found.items() if value}


def _named(part: Reference | RegisteredName) -> str:
    if isinstance(part, RegisteredName) or part.file is None:
        return part.text
    return f"{part.file}:{part.name}"


def _file_or_module(part: ModuleReference) -> str:
    return part.text if part.file is None else str(part.file)


def _path(option: str, value: Any) -> Any:
    """A path in a judge's settings, absolute where there is such a file."""
    is_path = option in FILES and isinstance(value, str) and Path(value).is_file()
    return os.path.abspath(value) if is_path else value
