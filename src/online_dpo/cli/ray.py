"""``online-dpo ray``: train on a Ray cluster as the section ``ray`` of a run file says."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from online_dpo.checkpoints.needed import Needs
from online_dpo.cli.parser import WRONG_INPUT
from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.help import RAY_USAGE, ray_help
from online_dpo.cli.runfile.planning import run_checked, split_words
from online_dpo.cli.runfile.ray_section import split_settings
from online_dpo.cli.runfile.run_file import DEFAULT_OUTPUT, INPUT_PATHS, RunPlan, plan_run
from online_dpo.config.requirements import RAY
from online_dpo.launch.environment import passed_on
from online_dpo.launch.job import Job
from online_dpo.launch.settings import STARTED_AS

KEY_VARIABLE = "VLLM_API_KEY"
FAILED = 1


def ray(words: Sequence[str]) -> int:
    """Run the command. Returns the exit code: that of `train`, or 2 if the cluster has no room for the run."""
    return run_checked(words, usage=RAY_USAGE, help=ray_help, plan=_plan, run=_run)


def _plan(run_file: Path | None, words: Sequence[str]) -> RunPlan:
    plan = plan_run(run_file, words, on_cluster=True)
    if RAY.missing:
        raise UsageError([f"Ray is not installed here. Install it with: {RAY.install}"])
    return plan


def _run(plan: RunPlan, words: list[str], show_traceback: bool) -> int:
    from online_dpo.launch.failures import ClusterError, MachinesLostError, ServerFailedError
    from online_dpo.launch.run import run_on_cluster

    try:
        return run_on_cluster(job_of(plan, words, show_traceback))
    except ClusterError as error:  # nothing is wrong here, so where it came from says nothing
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except (ServerFailedError, MachinesLostError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT if isinstance(error, ServerFailedError) and error.wrong_input else FAILED


def job_of(plan: RunPlan, words: Sequence[str], show_traceback: bool = False) -> Job:
    """What is to be started for a plan. ``words`` are those of the command."""
    run_file, others = split_words(words)
    to_train, _ = split_settings(others)
    values = {**plan.training, **vars(plan.run)}
    model = plan.run.model_name_or_path
    inputs = [os.path.abspath(path) for path in _local(values)]
    file = None if run_file is None else run_file.absolute()
    return Job(
        settings=plan.ray,
        run_file=file,
        words=[*to_train, *(["--traceback"] if show_traceback else [])],
        folder=os.getcwd(),
        output_dir=Path(os.path.expanduser(plan.training.get("output_dir") or DEFAULT_OUTPUT)),
        model=os.path.abspath(model) if os.path.isdir(model) else model,
        revision=plan.run.model_revision,
        trust_remote_code=bool(plan.training.get("trust_remote_code")),
        paths=[*([] if file is None else [str(file)]), *inputs],
        needs=Needs(values, plan.ray.trainers),
        variables=_variables(plan, words),
    )


def _local(values: dict[str, Any]) -> list[str]:
    """The inputs of the run that lie on a disk."""
    return [values[name] for name in INPUT_PATHS if values.get(name) and os.path.exists(values[name])]


def _variables(plan: RunPlan, words: Sequence[str]) -> dict[str, str]:
    """What all processes find in their environment. The key of servers is not shown in any list of processes."""
    passed = passed_on(os.environ, plan.ray.env_vars or [])
    passed[STARTED_AS] = shlex.join(["ray", *words])
    if plan.ray.servers:
        passed[KEY_VARIABLE] = os.environ.get(KEY_VARIABLE) or secrets.token_urlsafe(32)
    return passed
