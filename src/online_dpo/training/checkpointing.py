"""The checkpoints of a trainer: which one it goes on from, how it writes the next, and which go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from online_dpo import __version__
from online_dpo.checkpoints.choice import AUTO, newest_whole, none_found, problem_of_named, warning_of_named
from online_dpo.checkpoints.folders import folder_of, located, put_in_place, recover
from online_dpo.checkpoints.manifest import has_manifest, problem_of
from online_dpo.checkpoints.model_files import finish_model, replacing_model
from online_dpo.checkpoints.needed import Needs, processes, world_size_of
from online_dpo.checkpoints.rotation import keep_only, rotate
from online_dpo.checkpoints.writer import CheckpointWriter, Facts, Role
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.collectives import from_every_rank, from_first_rank
from online_dpo.errors import CheckpointError, named_error
from online_dpo.runs import events
from online_dpo.training.run_identity import RunIdentity
from online_dpo.training.torch_files import check_loads

logger = logging.getLogger(__name__)


class Checkpoints:
    """Reads and writes the checkpoints of a run, the same on every process.

    ``aside`` is the folder that stands for the run's folder while a checkpoint is written, else ``None``;
    ``from_others`` says whether another number of processes wrote the one that was resumed, ``passed_over`` why it is
    none of the newer ones.
    """

    def __init__(self, args: OnlineDPOConfig, accelerator: Accelerator, state: Callable[[], TrainerState]) -> None:
        self._args, self._accelerator, self._state = args, accelerator, state
        self._writer = CheckpointWriter(self._role())
        self._needs = Needs(vars(args), accelerator.num_processes)
        self.identity = RunIdentity(args, _versions())
        self._hidden = self.from_others = False
        self.passed_over = ""
        self.part = self._writer.part

    def _role(self) -> Role:
        rank = self._accelerator.process_index
        publisher = rank - self._accelerator.local_process_index if self._args.save_on_each_node else 0
        return Role(rank, self._args.should_save, publisher)

    @property
    def aside(self) -> Path | None:
        """The folder that stands for the run's folder while a checkpoint is written, or while all are hidden."""
        return Path(str(self._args.output_dir)) / ".no-checkpoints" if self._hidden else self._writer.aside

    def begin(self, resume: Any) -> str | None:
        """Ends what a killed process has left half done in the run's folder, and returns the checkpoint to go on from.
        A collective operation.

        Args:
            resume: what `train` was given: a folder, ``True`` (the newest whole checkpoint), ``"auto"`` (the same, if
                there is any checkpoint), or ``None``.

        Raises:
            CheckpointError: there is no such checkpoint, or it is not whole, or not all that this run needs is in it.
        """
        error, folder, self.from_others, self.passed_over = None, None, False, ""
        try:
            if self._args.should_save:
                recover(Path(str(self._args.output_dir)))
                finish_model(Path(str(self._args.output_dir)))
            if self._writer.role.rank == 0:
                folder = self._chosen(resume)
                self.identity.begin(folder)
                if folder is not None:
                    self._tell_of_other_processes(Path(folder))
        except CheckpointError as problem:
            error = problem
        except OSError as problem:
            error = CheckpointError(f"No checkpoint could be read: {named_error(problem)}.")
        for of_rank in from_every_rank(error):
            if of_rank is not None:
                raise of_rank
        self.identity.follow(from_first_rank(self.identity.origin))
        self.from_others = from_first_rank(self.from_others)
        return from_first_rank(folder)

    def _chosen(self, resume: Any) -> str | None:
        if resume is True or resume == AUTO:
            return self._newest(required=resume is True)
        if not resume:
            return None
        folder = Path(resume).expanduser()
        problem = problem_of_named(folder, self._needs)
        if problem is not None:
            raise CheckpointError(problem)
        if (warning := warning_of_named(folder)) is not None:
            logger.warning("%s", warning)
            check_loads(located(folder))
        if located(folder) != folder:
            put_in_place(folder)
        return str(folder)

    def _tell_of_other_processes(self, folder: Path) -> None:
        """Warns where a checkpoint is of another number of processes."""
        written, own = world_size_of(located(folder)), self._accelerator.num_processes
        if written is not None and written != own:
            self.from_others = True
            ahead = " Completions that were sampled ahead are dropped." if self._args.max_staleness else ""
            logger.warning(
                "%s was written by %s, and this run has %s: its steps go on, with the same prompts. Random numbers of "
                "your own code (reward functions, callbacks) and dropout are others.%s",
                folder,
                processes(written),
                processes(own),
                ahead,
            )

    def _newest(self, required: bool) -> str | None:
        output_dir = Path(str(self._args.output_dir))
        choice = newest_whole(output_dir, self._needs)
        if choice.folder is not None:
            self.passed_over = choice.reasons
            level = logging.WARNING if choice.passed_over else logging.INFO
            logger.log(level, "Resuming from %s%s", choice.folder, f", {choice.reasons}" if choice.passed_over else "")
            return str(choice.folder)
        if required or choice.passed_over:
            raise CheckpointError(none_found(output_dir, choice))
        logger.info("Starting from step 0: %s holds no checkpoint", output_dir)
        return None

    @contextmanager
    def writing(self, run_dir: Path) -> Iterator[Path]:
        """Yields the folder to write the checkpoint of this step to, which takes its place at the end. A collective
        operation.

        Raises:
            CheckpointError: on every process, if any could not write its part. The folder is as it was.
        """
        self._writer.role = self._role()  # another one where this process stands in for others that are lost
        facts = Facts(versions=_versions(), extra=self.identity.extra())
        try:
            with self._writer.writing(run_dir, self._state().global_step, facts) as folder:
                yield folder
                self._name_the_best(run_dir, folder)
        except CheckpointError as error:
            events.emit("checkpoint", str(error), name=f"checkpoint-{self._state().global_step}", saved=False)
            raise

    def _name_the_best(self, run_dir: Path, folder: Path) -> None:
        """Writes the state again, in which the parent has named the best checkpoint by its folder aside."""
        state = self._state()
        of_strategy = self._args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)
        if of_strategy and state.best_global_step:
            best = folder_of(run_dir, state.best_global_step)
            if state.best_global_step == state.global_step or best.is_dir():
                state.best_model_checkpoint = str(best)
            if self._args.should_save:
                state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def rotate(self, run_dir: Path) -> None:
        """Deletes checkpoints beyond ``save_total_limit``."""
        if self._args.should_save:
            _tell_removed(rotate(run_dir, self._args.save_total_limit, self._state().best_model_checkpoint))

    @contextmanager
    def hidden(self, run_dir: Path) -> Iterator[None]:
        """Inside, the parent finds no checkpoints and so deletes none. At the end, those that it would have deleted
        are: with ``save_total_limit`` 1, all but the best one.
        """
        self._hidden = True
        try:
            yield
        finally:
            self._hidden = False
        best = self._state().best_model_checkpoint
        if self._args.should_save and best is not None and self._args.save_total_limit == 1:
            _tell_removed(keep_only(run_dir, best))

    def check_best(self) -> None:
        """Checks the best checkpoint before its weights are loaded.

        Raises:
            CheckpointError: it is not as it was written.
        """
        folder = Path(str(self._state().best_model_checkpoint))
        problem = problem_of(folder) if has_manifest(folder) else None
        if problem is not None:
            raise CheckpointError(f"The best checkpoint, {folder}, cannot be loaded: {problem}.")

    def model_folder(self, folder: Path) -> AbstractContextManager[Path]:
        """Yields where to write the files of a model that are to be in ``folder``."""
        if self._writer.aside is not None or not self._args.should_save:
            return nullcontext(folder)
        return replacing_model(folder)


def _tell_removed(names: list[str]) -> None:
    if names:
        events.emit("checkpoint", f"{', '.join(names)} went (`save_total_limit`).", removed=names)


def _versions() -> dict[str, str]:
    """The versions of the packages that compute."""
    return {
        "online-dpo": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
