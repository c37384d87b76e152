"""The description of a run from its run file, printed before anything is loaded.

Heavy packages must not be imported here.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from online_dpo import __version__
from online_dpo.checkpoints.choice import AUTO, newest_whole
from online_dpo.checkpoints.needed import Needs
from online_dpo.cli.judging.plan import BuiltInJudge
from online_dpo.cli.runfile.plugins import RegisteredName
from online_dpo.cli.runfile.references import Reference
from online_dpo.cli.runfile.run_file import RunPlan
from online_dpo.cli.runfile.schema import load_fields
from online_dpo.config.engine import OF_VLLM, engine_name
from online_dpo.training.display.figures import count

WIDTH = 11
INDENT = WIDTH + 3
"""The column in which values begin."""


def describe_plan(plan: RunPlan) -> Iterator[str]:
    """The lines that describe a run: model, prompts, feedback, engine, batch, steps, output."""
    run = plan.run
    given = {name: value for name, value in plan.training.items() if value is not None}
    settings = {name: _default(spec.default) for name, spec in load_fields().items()} | given
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    yield f"online-dpo {__version__}"
    yield line("model", run.model_name_or_path + (f" with a LoRA adapter of rank {run.lora_r}" if run.use_peft else ""))
    yield line("prompts", f"{run.dataset_name} ({run.dataset_train_split})" + _limited(run.dataset_limit))
    if run.eval_dataset_name is not None or run.dataset_test_split is not None:
        split = f"({run.dataset_test_split or 'train'})"
        yield line("evaluation", f"{run.eval_dataset_name or run.dataset_name} {split}" + _limited(run.eval_limit))
    yield line("feedback", _feedback(plan, given))
    yield line("reference", _reference(plan, settings))
    yield line("engine", _engine(settings))
    yield line("batch", _batch(settings, processes))
    if plan.sharding is not None:
        yield line("sharding", f"{plan.sharding.name} over {processes} process{'es' if processes > 1 else ''}")
    yield from _extent(settings, given.get("resume_from_checkpoint"))


def _extent(settings: dict[str, Any], checkpoint: str | bool | None) -> Iterator[str]:
    """The lines that say how long the run is, where it writes and what it resumes."""
    if settings["max_steps"] > 0:
        yield line("steps", count(settings["max_steps"]))
    else:
        yield line("epochs", f"{settings['num_train_epochs']:g}")
    yield line("output", settings["output_dir"] or "trainer_output")
    if checkpoint:
        yield line("resumes", _resumed(settings, checkpoint))


def _resumed(settings: dict[str, Any], checkpoint: str | bool) -> str:
    """The checkpoint that a run goes on from."""
    if isinstance(checkpoint, str) and checkpoint != AUTO:
        return checkpoint
    output = Path(os.path.expanduser(settings["output_dir"] or "trainer_output"))
    folder = newest_whole(output, Needs(settings, int(os.environ.get("WORLD_SIZE", "1")))).folder
    return "nothing: the output folder holds no checkpoint" if folder is None else f"{folder}, the newest whole one"


def is_first_process() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def line(name: str, value: str) -> str:
    """One line of a description: a name, and its value in the column of values."""
    return f"  {name:<{WIDTH}} {value}"


def _default(text: str | None) -> Any:
    """The value of a default from its source text; ``None`` if it is not a literal."""
    try:
        return None if text is None else ast.literal_eval(text)
    except ValueError:
        return None


def _limited(rows: int | None) -> str:
    return "" if rows is None else f", at most {count(rows)} rows"


def _feedback(plan: RunPlan, given: dict[str, Any]) -> str:
    rewards = [reference.text for reference in plan.reward_funcs]
    rewards += [given["reward_model_path"]] if "reward_model_path" in given else []
    judge = [] if plan.judge is None else [f"judge {_judge(plan.judge)}"]
    return ", ".join(rewards + judge)


def _judge(judge: Reference | RegisteredName | BuiltInJudge) -> str:
    if isinstance(judge, (Reference, RegisteredName)):
        return judge.text
    if judge.human:
        return "people, who vote in `online-dpo dashboard`"
    return str(judge.options["model"] if judge.folder is None else judge.folder)


def _reference(plan: RunPlan, settings: dict[str, Any]) -> str:
    if settings["reference_free"]:
        return "none"
    if plan.run.ref_model_name_or_path is not None:
        return plan.run.ref_model_name_or_path
    return "the model without the adapter" if plan.run.use_peft else "the model as it is before training"


def _engine(settings: dict[str, Any]) -> str:
    sampling = f"{settings['num_completions']} completions a prompt, up to {settings['max_new_tokens']} tokens"
    name = engine_name(settings["engine"], settings["use_vllm"], settings["vllm_mode"])
    if name not in OF_VLLM:
        return f"{name}; {sampling}"
    if name == "vllm_colocate":
        return f"vLLM in this process; {sampling}"
    address = settings["vllm_server_base_url"] or f"{settings['vllm_server_host']}:{settings['vllm_server_port']}"
    return f"vLLM at {address}; {sampling}"


def _batch(settings: dict[str, Any], processes: int) -> str:
    """The batch of a step: ``8 prompts x 4 accumulated x 2 processes = 64 prompts with 128 completions a step``."""
    device, accumulated = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    factors = [f"{device} prompts"]
    factors += [f"{accumulated} accumulated"] if accumulated > 1 else []
    factors += [f"{processes} processes"] if processes > 1 else []
    prompts = device * accumulated * processes
    product = f" = {prompts} prompts" if len(factors) > 1 else ""
    return f"{' x '.join(factors)}{product} with {prompts * settings['num_completions']} completions a step"
