"""``online-dpo train`` after its arguments have been checked: build the trainer, train, save."""

from __future__ import annotations

import inspect
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from online_dpo.cli.judging.plan import BuiltInJudge
from online_dpo.cli.runfile.plugins import RegisteredName
from online_dpo.cli.runfile.references import Reference, load_reference
from online_dpo.cli.runfile.resolved import resolved_settings
from online_dpo.cli.runfile.run_config import RunConfig
from online_dpo.cli.runfile.run_file import DEFAULT_OUTPUT, RunPlan
from online_dpo.cli.terminal.errors import report_error
from online_dpo.cli.terminal.header import INDENT
from online_dpo.cli.terminal.progress import ProgressDisplay, no_progress_bars, plain_warnings
from online_dpo.cli.terminal.screen import print_lines
from online_dpo.cli.terminal.summary import describe_trainer, places
from online_dpo.config.feedback import HUMAN
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.load import load_prompts
from online_dpo.distributed.rank_watch import explained
from online_dpo.distributed.settings import kept_settings
from online_dpo.distributed.signals import StoppedBySignal, handling, is_interruption, name_of, write_now
from online_dpo.errors import (
    CheckpointError,
    NothingTrainedError,
    OnlineDPOError,
    RankLostError,
    TrainingInterrupted,
    is_out_of_memory,
    named_error,
)
from online_dpo.foreign import foreign, loading
from online_dpo.launch.settings import STARTED_AS
from online_dpo.modeling.memory import named_memory_error
from online_dpo.runs.beginning import ForeignFileError, check_own
from online_dpo.scoring.judges.llm.judge import LLMJudge
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.training.run_identity import check_options
from online_dpo.training.session_facts import as_yaml
from online_dpo.training.trainer import OnlineDPOTrainer


@no_progress_bars()
@plain_warnings()
def train(plan: RunPlan, words: Sequence[str], *, show_traceback: bool) -> int:
    """Run a checked plan and return the exit code: 0, 1, 2, 3 (nothing was trained) or 128 plus a signal's number.

    ``words`` are the words of the command, to print the command that resumes it.
    """
    try:
        trainer = build_trainer(plan, ProgressDisplay())
    except BaseException as error:  # libraries have their own for a file, a hub or a tracker that they cannot use
        if is_interruption(error):
            raise
        if is_out_of_memory(error):
            return report_error(named_memory_error(error, "while the run was set up"), 1, show_traceback)
        return report_error(error, 1 if isinstance(error, RankLostError) else 2, show_traceback)
    trainer.recording.command = ["online-dpo", *_started_as(words)]
    if trainer.is_world_process_zero():
        print_lines(describe_trainer(trainer), INDENT)
    end = EndOfRun()
    with handling(end.receive), trainer.recording.ending() as record_end:
        code = _train(trainer, plan, words, show_traceback)
        end.is_saving = True
        return record_end(code or _save(trainer, words, show_traceback))


def _train(trainer: OnlineDPOTrainer, plan: RunPlan, words: Sequence[str], show_traceback: bool) -> int:
    try:
        trainer.train(resume_from_checkpoint=plan.training.get("resume_from_checkpoint") or None)
    except TrainingInterrupted as stop:
        if trainer.is_world_process_zero():
            _print_how_to_resume(str(stop).partition(". ")[0] + ":", stop.checkpoint, words)
        return 128 + stop.signal
    except NothingTrainedError as error:
        return report_error(error, 3, show_traceback)
    except BaseException as error:  # every end of a run is reported in one line; --traceback shows the rest
        if is_interruption(error):
            raise
        # transformers and torch check some settings only when training starts
        is_wrong_setting = trainer.state.global_step == 0 and not isinstance(error, OnlineDPOError)
        is_wrong_setting |= isinstance(error, CheckpointError) and trainer.steps_done.step < 0  # it cannot be resumed
        code = report_error(error, 2 if is_wrong_setting else 1, show_traceback)
        _print_checkpoint_before(trainer, words, error)
        return code
    return 0


def _save(trainer: OnlineDPOTrainer, words: Sequence[str], show_traceback: bool) -> int:
    """Save a trained model, its log and its card; where that fails on any rank, a checkpoint of the run."""
    folder = str(trainer.args.output_dir)
    steps = {
        f"Saving the trained model in {folder}": trainer.save_model,
        f"The model is saved in {folder}, but saving the run's log beside it": trainer.save_state,
        f"The model is saved in {folder}, but writing its card (README.md)": trainer.create_model_card,
    }
    for what, step in steps.items():
        try:
            trainer.errors.run(step)
        except BaseException as raised:
            if is_interruption(raised):
                raise
            error = explained(raised)
            trainer.rescue.leave_checkpoint(error)
            failure = OnlineDPOError(f"{what} failed: {named_error(error)}")
            failure.__cause__ = error
            trainer.recording.fail(failure)
            code = report_error(failure, 1, show_traceback)
            _print_checkpoint_before(trainer, words, error)
            return code
    if trainer.is_world_process_zero():
        print_lines(places(folder))
    return 0


class EndOfRun:
    """Signals after the last step: a model that is being saved is saved, unless a third Ctrl-C insists."""

    def __init__(self) -> None:
        self.is_saving = False
        self._presses = 0

    def receive(self, number: signal.Signals) -> None:
        """Handle a signal. One that comes before training has begun is handled when it begins.

        Raises:
            StoppedBySignal: at a third Ctrl-C.
        """
        self._presses += number is signal.SIGINT
        if self._presses > 2:
            raise StoppedBySignal(number)
        if self.is_saving:
            again = " Press Ctrl-C again to stop at once, without it." if self._presses == 2 else ""
            write_now(f"\n{name_of(number)}: the run is over, and its model is being saved.{again}\n")


def build_trainer(plan: RunPlan, display: ProgressDisplay) -> OnlineDPOTrainer:
    """Build the trainer of a plan. ``display`` shows its progress.

    Raises:
        ValueError, TypeError, OSError, ImportError, OnlineDPOError: the run cannot be set up as asked.
    """
    run = plan.run
    given = {name: value for name, value in plan.training.items() if name != "resume_from_checkpoint"}
    with kept_settings("Importing the run's own code"):
        plan.plugins.load()
        rewards = load_rewards(plan.reward_funcs, given.pop("reward_model_path", None))
        gold = load_rewards(plan.eval_reward_funcs, given.pop("eval_reward_model_path", None))
    given["run_folder"] = _has_run_folder(given)
    args = OnlineDPOConfig(**{**given, "disable_tqdm": True})
    check_options(plan.training.get("resume_from_checkpoint"), args)
    train_dataset = train_dataset_of(run)
    trainer = OnlineDPOTrainer(
        model=run.model_name_or_path,
        ref_model=run.ref_model_name_or_path,
        reward_funcs=rewards or None,
        judge=None if plan.judge is None else load_judge(plan.judge, args),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset_of(run),
        processing_class=load_tokenizer(run.model_name_or_path, args),
        peft_config=peft_config_of(run),
        eval_reward_funcs=gold or None,
        eval_judge=None if plan.eval_judge is None else load_judge(plan.eval_judge, args),
        callbacks=[display],
    )
    trainer.recording.settings = as_yaml(resolved_settings(plan))
    return trainer


def _has_run_folder(given: dict[str, Any]) -> bool:
    """Whether a run folder is written. Where nothing is said of it, not over files of another program.

    Raises:
        ForeignFileError: it is asked for, and there are such files.
    """
    if given.get("run_folder") is False:
        return False
    try:
        check_own(Path(given.get("output_dir") or DEFAULT_OUTPUT).expanduser())
    except ForeignFileError as problem:
        if given.get("run_folder"):
            raise
        print(f"warning: no run folder is written. {problem}", file=sys.stderr)
        return False
    return True


def train_dataset_of(run: RunConfig) -> Any:
    """Loads the prompts to train on."""
    return load_prompts(
        run.dataset_name,
        split=run.dataset_train_split,
        config=run.dataset_config,
        streaming=run.dataset_streaming,
        limit=run.dataset_limit,
        types=run.dataset_types,
    )


def eval_dataset_of(run: RunConfig) -> Any:
    """Loads the prompts to evaluate on; ``None`` where there are none."""
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


def peft_config_of(run: RunConfig) -> Any:
    """Returns the configuration of the adapter to train; `None` where all weights are."""
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

    A registered name is returned as text, since the trainer looks it up; so are people, whom it asks in its own folder.

    Raises:
        ValueError, TypeError, OSError, ImportError: it cannot be loaded.
    """
    if isinstance(judge, RegisteredName):
        return judge.text
    if isinstance(judge, BuiltInJudge):
        if judge.human:
            return HUMAN
        if judge.folder is None:
            return LLMJudge(**judge.options)
        options = {"max_failure_share": args.max_failure_share, **judge.options}
        return PairwiseModelJudge.load(str(judge.folder), args.device, **options)
    loaded = load_reference(judge)
    if not inspect.isclass(loaded):
        return loaded
    with foreign(f"Making judge `{judge.text}`", raises=ValueError):
        return loaded()


def _print_checkpoint_before(trainer: OnlineDPOTrainer, words: Sequence[str], error: BaseException) -> None:
    """Say how to resume: on the first rank, or on the others where it is lost."""
    speaks = trainer.is_world_process_zero() or (isinstance(error, RankLostError) and 0 in error.ranks)
    if trainer.interrupt.checkpoint is not None and speaks:
        _print_how_to_resume("Before that:", trainer.interrupt.checkpoint, words)


def _print_how_to_resume(beginning: str, checkpoint: str | None, words: Sequence[str]) -> None:
    if checkpoint is None:
        print(f"{beginning} No checkpoint was saved.", file=sys.stderr)
        return
    command = shlex.join(["online-dpo", *resume_words(_started_as(words), checkpoint)])
    print(f"{beginning} checkpoint saved in {checkpoint}. Resume with: {command}", file=sys.stderr)


def _started_as(words: Sequence[str]) -> list[str]:
    """The words of the command that a user has given."""
    return shlex.split(os.environ.get(STARTED_AS, "")) or ["train", *words]


def resume_words(words: Sequence[str], checkpoint: str) -> list[str]:
    """The words of a command that resumes from a checkpoint; an earlier ``resume_from_checkpoint`` is removed."""
    kept, skipping = [], False
    for word in words:
        if word.startswith("--"):
            skipping = word[2:].partition("=")[0].replace("-", "_") == "resume_from_checkpoint"
        if not skipping:
            kept.append(word)
    return [*kept, "--resume_from_checkpoint", checkpoint]
