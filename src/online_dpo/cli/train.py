"""``online-dpo train`` after its arguments have been checked: build the trainer, train, save."""

from __future__ import annotations

import inspect
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from online_dpo.cli.judging.plan import BuiltInJudge
from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.plugins import RegisteredName
from online_dpo.cli.runfile.references import Reference, load_reference
from online_dpo.cli.runfile.run_config import RunConfig
from online_dpo.cli.runfile.run_file import RunPlan
from online_dpo.cli.terminal.header import INDENT
from online_dpo.cli.terminal.progress import ProgressDisplay, no_progress_bars, plain_warnings
from online_dpo.cli.terminal.screen import print_lines
from online_dpo.cli.terminal.summary import describe_trainer, places
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.load import load_prompts
from online_dpo.errors import (
    CheckpointError,
    NothingTrainedError,
    OnlineDPOError,
    TrainingInterrupted,
    error_text,
    named_error,
)
from online_dpo.foreign import loading
from online_dpo.scoring.judges.llm.judge import LLMJudge
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.training.run_identity import check_options
from online_dpo.training.trainer import OnlineDPOTrainer

SETUP_ERRORS = (Exception,)
"""What setting up a run may raise for wrong input. Libraries have their own exceptions for a file that cannot be read,
a hub that cannot be reached, or a tracker without its key; all are reported in one line."""


EXPLAINED = (ValueError, TypeError, OSError, ImportError, OnlineDPOError)
"""Exceptions whose message is clear without the name of their type."""


@no_progress_bars()
@plain_warnings()
def train(plan: RunPlan, words: Sequence[str], *, show_traceback: bool) -> int:
    """Run a checked plan and return the exit code: 0, 1, 2, 3 (nothing was trained) or 130 (Ctrl-C).

    ``words`` are the words of the command, to print the command that resumes it.
    """
    resume = plan.training.get("resume_from_checkpoint") or None
    try:
        trainer = build_trainer(plan, ProgressDisplay())
    except SETUP_ERRORS as error:
        return report_error(error, 2, show_traceback)
    is_main = trainer.is_world_process_zero()
    if is_main:
        print_lines(describe_trainer(trainer), INDENT)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except TrainingInterrupted as stop:
        if is_main:
            _print_how_to_resume(str(stop).partition(". ")[0] + ":", stop.checkpoint, words)
        return 130
    except NothingTrainedError as error:
        return report_error(error, 3, show_traceback)
    except Exception as error:  # every end of a run is reported in one line; --traceback shows the rest
        # transformers and torch check some settings only when training starts
        is_wrong_setting = trainer.state.global_step == 0 and not isinstance(error, OnlineDPOError)
        is_wrong_setting |= isinstance(error, CheckpointError) and trainer.steps_done.step < 0  # it cannot be resumed
        code = report_error(error, 2 if is_wrong_setting else 1, show_traceback)
        if trainer.interrupt.checkpoint is not None:
            _print_how_to_resume("Before that:", trainer.interrupt.checkpoint, words)
        return code
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if is_main:
        print_lines(places(str(trainer.args.output_dir)))
    return 0


def build_trainer(plan: RunPlan, display: ProgressDisplay) -> OnlineDPOTrainer:
    """Build the trainer of a plan. ``display`` shows its progress.

    Raises:
        ValueError, TypeError, OSError, ImportError, OnlineDPOError: the run cannot be set up as asked.
    """
    plan.plugins.load()
    run = plan.run
    given = {name: value for name, value in plan.training.items() if name != "resume_from_checkpoint"}
    rewards = load_rewards(plan.reward_funcs, given.pop("reward_model_path", None))
    gold = load_rewards(plan.eval_reward_funcs, given.pop("eval_reward_model_path", None))
    args = OnlineDPOConfig(**{**given, "disable_tqdm": True})
    check_options(plan.training.get("resume_from_checkpoint"), args)
    train_dataset = load_prompts(
        run.dataset_name,
        split=run.dataset_train_split,
        config=run.dataset_config,
        streaming=run.dataset_streaming,
        limit=run.dataset_limit,
        types=run.dataset_types,
    )
    return OnlineDPOTrainer(
        model=run.model_name_or_path,
        ref_model=run.ref_model_name_or_path,
        reward_funcs=rewards or None,
        judge=None if plan.judge is None else load_judge(plan.judge, args),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=_eval_dataset(run),
        processing_class=load_tokenizer(run.model_name_or_path, args),
        peft_config=_peft_config(run),
        eval_reward_funcs=gold or None,
        eval_judge=None if plan.eval_judge is None else load_judge(plan.eval_judge, args),
        callbacks=[display],
    )


def _eval_dataset(run: RunConfig) -> Any:
    if run.eval_dataset_name is None and run.dataset_test_split is None:
        return None
    return load_prompts(
        run.eval_dataset_name or run.dataset_name,
        split=run.dataset_test_split or "train",
        config=run.dataset_config if run.eval_dataset_name is None else None,
        limit=run.eval_limit,
        types=run.dataset_types,
    )


def load_tokenizer(model: str, args: OnlineDPOConfig) -> Any:
    """Load the tokenizer of a model, at the revision in ``model_init_kwargs`` if there is one."""
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    with loading(model):
        return AutoTokenizer.from_pretrained(
            model, revision=options.get("revision", "main"), trust_remote_code=args.trust_remote_code
        )


def _peft_config(run: RunConfig) -> Any:
    if not run.use_peft:
        return None
    from peft import LoraConfig

    modules = run.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=run.lora_r,
        lora_alpha=run.lora_alpha,
        lora_dropout=run.lora_dropout,
        # peft accepts `all-linear` only as a text, not as a list with one entry
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        target_parameters=run.lora_target_parameters,
        modules_to_save=run.lora_modules_to_save,
        use_rslora=run.use_rslora,
        use_dora=run.use_dora,
    )


def load_rewards(functions: Sequence[Reference | RegisteredName], reward_model: str | None) -> list[Any]:
    """Load the reward functions and add the path of the reward model; all of them are summed."""
    rewards: list[Any] = [load_reward(function) for function in functions]
    return rewards if reward_model is None else [*rewards, reward_model]


def load_reward(function: Reference | RegisteredName) -> Any:
    """Load a reward function; a registered name is returned as text, since the trainer looks it up."""
    return function.text if isinstance(function, RegisteredName) else load_reference(function)


def load_judge(judge: Reference | RegisteredName | BuiltInJudge, args: OnlineDPOConfig) -> Any:
    """Load a judge of this package, or the user's own; a class is instantiated without arguments.

    A registered name is returned as text, since the trainer looks it up.

    Raises:
        ValueError, TypeError, OSError, ImportError: it cannot be loaded.
    """
    if isinstance(judge, RegisteredName):
        return judge.text
    if isinstance(judge, BuiltInJudge):
        if judge.folder is None:
            return LLMJudge(**judge.options)
        return PairwiseModelJudge.load(str(judge.folder), args.device, **judge.options)
    loaded = load_reference(judge)
    return loaded() if inspect.isclass(loaded) else loaded


def report_error(error: BaseException, code: int, show_traceback: bool) -> int:
    """Print an error in one line, or its traceback, and return the exit code."""
    if isinstance(error, UsageError):
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
    elif show_traceback:
        traceback.print_exception(error)
    else:
        message = error_text(error) if isinstance(error, EXPLAINED) else named_error(error)
        print(f"error: {message}\n(--traceback shows where it came from)", file=sys.stderr)
    return code


def _print_how_to_resume(beginning: str, checkpoint: str | None, words: Sequence[str]) -> None:
    if checkpoint is None:
        print(f"{beginning} No checkpoint was saved.", file=sys.stderr)
        return
    command = shlex.join(["online-dpo", "train", *resume_words(words, checkpoint)])
    print(f"{beginning} checkpoint saved in {checkpoint}. Resume with: {command}", file=sys.stderr)


def resume_words(words: Sequence[str], checkpoint: str) -> list[str]:
    """The words of a command that resumes from a checkpoint; an earlier ``resume_from_checkpoint`` is removed."""
    kept, skipping = [], False
    for word in words:
        if word.startswith("--"):
            skipping = word[2:].partition("=")[0].replace("-", "_") == "resume_from_checkpoint"
        if not skipping:
            kept.append(word)
    return [*kept, "--resume_from_checkpoint", checkpoint]
