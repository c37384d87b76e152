"""`transformers.Trainer` with what keeps a run alive and measured: guards, memory recovery, metrics, seconds by phase.

It knows nothing of preferences; :class:`online_dpo.training.trainer.OnlineDPOTrainer` adds the stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PredictionOutput

from online_dpo.checkpoints.files import replacing
from online_dpo.checkpoints.folders import by_age, folder_of
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.distributed.agreement import Agreement
from online_dpo.distributed.collectives import RankErrors
from online_dpo.distributed.device_memory import free_kept_memory
from online_dpo.distributed.on_cpu import fsdp_on_cpu
from online_dpo.distributed.process_state import kept_environment, kept_random_state
from online_dpo.distributed.rank_watch import watch_ranks
from online_dpo.distributed.sharding import sharding_for
from online_dpo.distributed.weights import full
from online_dpo.modeling.borrowing import kept_flags
from online_dpo.modeling.loading import ConfigKeeper, forget_tied_names
from online_dpo.modeling.precision import keeps_small_steps
from online_dpo.packing.microbatches import tokens_read
from online_dpo.training.checkpointing import Checkpoints
from online_dpo.training.display.choose import choose_displays
from online_dpo.training.evaluation_weights import EvaluationWeights
from online_dpo.training.failures import NamedCallbacks, StepsDone
from online_dpo.training.finite import FiniteWeights
from online_dpo.training.hub_uploads import without_record
from online_dpo.training.interrupt import Interrupt
from online_dpo.training.learning_rate import LearningRateBackoff
from online_dpo.training.log_state import LogState
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.work import Work, cost_of
from online_dpo.training.other_ranks import OtherRanks
from online_dpo.training.pass_size import PassSize
from online_dpo.training.passes import PassRunner
from online_dpo.training.recording import Recording, tells_end
from online_dpo.training.rescue import Rescue
from online_dpo.training.resumed_random_state import ResumedRandomState
from online_dpo.training.run_context import RunContext
from online_dpo.training.run_state import RunState
from online_dpo.training.sharded_state import ShardedState, unsharded_files
from online_dpo.training.step_guard import StepGuard
from online_dpo.training.stopwatch import PhaseTimer
from online_dpo.training.update_ratio import UpdatedRatio
from online_dpo.types import PackedRows


class GuardedTrainer(Trainer):
    """A `Trainer` whose micro-batches hold a list of :class:`~online_dpo.types.PackedRows` under ``"passes"``.

    Each gets a forward and a backward pass of its own, as ``"rows"`` of the inputs of ``compute_loss``. Steps that are
    not finite are skipped on every rank; a pass that runs out of memory is split in two; values put into
    ``metrics`` appear in the next training log, reduced over ranks; the model's configs stay as they were given.
    """

    # Read by transformers.Trainer: the loss is divided by the pairs of the whole step already.
    loss_is_scaled_for_ga = True
    push_to_hub = without_record()(Trainer.push_to_hub)

    def __init__(self, model: nn.Module, args: OnlineDPOConfig, **kwargs: Any) -> None:
        self.configs = ConfigKeeper()
        self.configs.remember(model)
        super().__init__(model=model, args=args, **kwargs)
        self.configs.restore()
        self.callback_handler: NamedCallbacks = NamedCallbacks(self.callback_handler)
        self.add_callback(self.configs)
        self.model_accepts_loss_kwargs = True
        agreement = Agreement(args.ddp_timeout_delta)
        self.sharding = sharding_for(self.accelerator, agreement.check)
        self.shards = ShardedState(self.sharding, model, args.save_on_each_node)
        self.metrics = MetricStore()
        self.phase = PhaseTimer(self.metrics, self.accelerator.device)
        self.errors = RankErrors(self.accelerator.device)
        self.pass_size = PassSize(args, self.sharding, lambda: self.optimizer, self.accelerator.device)
        parts = (self.metrics, self.phase, lambda: self.pass_size.row_capacity, agreement, self.errors)
        self.passes = PassRunner(*parts, lambda: self.sharding.abandon_pass(self.model), free_kept_memory)  # pyright: ignore[reportArgumentType]
        self.evaluation_weights = EvaluationWeights(lambda: self.optimizer, lambda: self.is_in_train)
        self._build_guards(args)
        self.resumed_random_state = ResumedRandomState(super()._load_rng_state)
        self.context = RunContext(
            self.accelerator,
            self.errors,
            self.metrics,
            self.phase,
            Work(self.metrics, cost_of(model)),
            state=lambda: self.state,
            holds_evaluation_weights=lambda: self.evaluation_weights.held,
            prompts_read=self.resumed_random_state.restore,
            differs=lambda: self.checkpoints.identity.differs or self.checkpoints.from_others,
        )
        self.checkpoints = Checkpoints(args, self.accelerator, lambda: self.state)
        self.run_state = RunState(self.guard, self.log_state, self.recording, self.pass_size)

    def _build_guards(self, args: OnlineDPOConfig) -> None:
        """Builds what watches over the run, in the order in which the callbacks among it are called."""
        self.interrupt = Interrupt(is_updating=lambda: self.steps_done.updating)
        self.add_callback(self.interrupt)  # before the guard, which has a last log written
        self.finite = FiniteWeights(self.accelerator.device, lambda: self.optimizer)
        self.finite.add("the policy", self.model)  # pyright: ignore[reportArgumentType]
        factor, recovery = args.skipped_step_lr_factor, args.skipped_step_lr_recovery
        self.backoff = LearningRateBackoff(factor, recovery, trains=lambda: self.guard.trains)
        limits = (args.max_skipped_steps, args.max_idle_steps)
        checks = (self._on_skip, self.finite.check_start)
        self.guard = StepGuard(self.accelerator, *limits, self.backoff, *checks, self.sharding)
        self.add_callback(self.guard)
        self.updates = UpdatedRatio(lambda: self.guard.trained_steps, warns=not keeps_small_steps(args))
        self.add_callback(self.updates)
        self.log_state = LogState(self.metrics, self.accelerator.device)
        self.add_callback(self.log_state)
        self.recording = Recording(args, self.accelerator, self.errors, lambda: self.state, self.log_state.is_in_step)
        self.add_callback(self.recording)
        keeps_parts = self.sharding.splits_state or args.max_staleness > 0
        self.others = OtherRanks(watch_ranks(args.ddp_timeout), self.log_state, keeps_parts)
        self.add_callback(self.others)
        self.steps_done = StepsDone(self.raise_callback_failure)
        self.add_callback(self.steps_done)
        self.add_callback(self.backoff)
        self.rescue = Rescue(
            self.callback_handler,
            self.others,
            self.errors,
            self.steps_done,
            state=lambda: self.state,
            updaters=lambda: (self.optimizer, self.lr_scheduler),
            holds_steps=self._holds_steps_done,
            save=self._rescue_steps,
            newest=lambda: next(reversed(by_age(Path(str(self.args.output_dir)))), None),
        )

    @tells_end
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`. ``resume_from_checkpoint=True`` goes on from the newest whole checkpoint;
        ``"auto"`` too, but it starts a run where there is none.

        Raises:
            CheckpointError: a checkpoint could not be saved, or cannot be resumed from.
            TrainingDivergedError: ``max_skipped_steps`` steps in a row were not finite; a checkpoint has been saved.
            TrainingStalledError: ``max_idle_steps`` steps in a row trained nothing; a checkpoint has been saved.
            NothingTrainedError: no step trained anything; a checkpoint has been saved if there were steps.
            ValueError: the optimizer trains no weight of the model.
            TrainingInterrupted: Ctrl-C was pressed; unless it was pressed twice, a checkpoint has been saved. After
                SIGTERM and other signals, a `TrainingTerminated`.
            ForeignCodeError: a callback, a metric, a data collator, a dataset or an optimizer failed; as after any
                other error, there is a checkpoint of the steps done, unless an update was half done.
        """
        self.log_state.begin_run()
        self.guard.begin_run()
        self.steps_done.begin_run()
        self.errors.begin_run()
        self.configs.remember(self.model)  # pyright: ignore[reportArgumentType]
        displays = choose_displays(self)
        try:
            handled = self.interrupt.handled(displays, self.args.stop_timeout)  # pyright: ignore
            with handled, self.rescue.failures_leave_checkpoint(), self.log_state.machine.gpu.watching():
                checkpoint = self.checkpoints.begin(resume_from_checkpoint)
                self.recording.begin(checkpoint, self.checkpoints.passed_over)
                result = super().train(checkpoint, *args, **kwargs)
                self.raise_callback_failure()
        finally:
            self.configs.restore()
            self.is_in_train = False  # the parent leaves it on where training fails
            self.evaluation_weights.put(True)
            for display in displays:
                display.close()
        self._check_finite("At the end")
        self.guard.raise_at_end(self.state, self.args.output_dir)  # pyright: ignore[reportArgumentType]
        return result

    def raise_callback_failure(self) -> None:
        """Raises on every rank what a callback of the user's has raised on any; a collective operation."""
        self.errors.raise_if_any(self.callback_handler.failure)

    def _holds_steps_done(self) -> bool:
        """Whether the model holds finite weights of the steps done; at the end of a run, it may be the best ones."""
        over = self.state.global_step >= self.state.max_steps and self.args.load_best_model_at_end
        return not over and not self.finite.found

    def _rescue_steps(self) -> str | None:
        self._save_checkpoint(self.model, trial=None)  # pyright: ignore[reportArgumentType]
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)  # pyright: ignore
        return self.interrupt.checkpoint

    def create_accelerator_and_postprocess(self) -> None:
        """The parent's; processes on CPUs shard as well, and the next trainer of this process chooses for itself."""
        with fsdp_on_cpu(), kept_environment():
            super().create_accelerator_and_postprocess()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self.shards.remember_order(self.model, optimizer)  # pyright: ignore[reportArgumentType]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """The parent's, after which an update of the weights is made when `optimizer.step()` is called. A sharded run
        goes on from files of ours.
        """
        folder = resume_from_checkpoint if self.shards.is_on else None
        if folder is not None and not self.shards.reads_weights(folder, self.model):  # pyright: ignore
            with unsharded_files(self):
                self._load_from_checkpoint(folder)
        of_parent = None if self.shards.is_on else resume_from_checkpoint
        model, dataloader = super()._prepare_for_training(max_steps, train_dataloader, of_parent)
        self.optimizer = self.callback_handler.optimizer = self.sharding.attach(model, self.optimizer)
        if folder is not None:
            self._load_optimizer_and_scheduler(folder)
            self._load_scaler(folder)
        return model, dataloader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The parent's, unless the checkpoint that is resumed was the run's last: it would train one more step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        in_mid_epoch = kwargs["epoch"] == kwargs["epochs_trained"] and kwargs["steps_trained_in_current_epoch"] > 0
        self.resumed_random_state.begin_epoch(kwargs["resume_from_checkpoint"] if in_mid_epoch else None)
        super()._run_epoch(*args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The parent's, unless it has been done."""
        self.resumed_random_state.load(checkpoint)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent's, beside training (see `beside_training`)."""
        with self.beside_training():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As the parent's, beside training (see `beside_training`)."""
        with self.beside_training():
            return super().predict(*args, **kwargs)

    @contextmanager
    def beside_training(self) -> Iterator[None]:
        """Keeps what is done inside from changing training: its time does not count in ``perf/tokens_per_second``, and
        random numbers that are drawn meanwhile, by a reward function too, are drawn again.
        """
        with self.log_state.stopped_clock(), kept_random_state():
            yield

    def _check_finite(self, when: str) -> None:
        self.finite.check(self.state, self.args.output_dir, when, agree=True)  # pyright: ignore[reportArgumentType]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent's, with the weights that are evaluated (see `EvaluationWeights`).

        Raises:
            TrainingDivergedError: the weights are not finite; nothing is saved.
        """
        if output_dir is None or not _internal_call:  # else they are a checkpoint's, which has checked them
            folder: Any = self.args.output_dir
            self.finite.check(self.state, folder, "Before a save", agree=self.shards.is_on, optimizer=False)
        with self.evaluation_weights.in_model(), unsharded_files(self):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The parent's. The files take their places together, when all are written. In a checkpoint, an error waits
        for the other processes, which the parent has meet after this.
        """
        folder = Path(str(self.args.output_dir) if output_dir is None else output_dir)
        if self.shards.is_on:
            state_dict = self.shards.whole_weights(self.model, keep=self.args.should_save)  # pyright: ignore
        with self.checkpoints.part(), self.checkpoints.model_folder(folder) as aside:
            super()._save(str(aside), state_dict)
            if self.args.should_save:  # the others would read while it is written
                self.shards.correct_config(aside)

    def save_state(self) -> None:
        """As the parent's; the file is whole or as it was."""
        if self.is_world_process_zero():
            with replacing(Path(str(self.args.output_dir)) / TRAINER_STATE_NAME) as aside:
                self.state.save_to_json(str(aside))

    def _get_output_dir(self, trial: Any) -> str:
        """The parent's; a folder aside while a checkpoint is written."""
        return super()._get_output_dir(trial) if self.checkpoints.aside is None else str(self.checkpoints.aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The parent's, with the model card and the state of every part of the run; whole or absent on the disk."""
        self._check_finite("Before a save")
        with self.interrupt.request.saving():
            self._save_all(model, trial)

    def _save_all(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        with self.checkpoints.writing(run_dir) as folder:
            with self.checkpoints.part():
                self.create_model_card()
            with self.evaluation_weights.in_model():
                super()._save_checkpoint(model, trial)
            self.run_state.save(folder, self.accelerator.process_index)
            self.others.write_files(folder)
        if self.args.push_to_hub:
            with without_record():
                super()._push_from_checkpoint(str(folder_of(run_dir, self.state.global_step)))
        self.checkpoints.rotate(run_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: the parent calls it before the checkpoint is in its place; `_save_checkpoint` pushes later."""

    def _save_rng_state(self, output_dir: str) -> None:
        """The parent's, unless this process saves for others that are lost: then there are the files of all."""
        if not self.others.stands_in:
            super()._save_rng_state(output_dir)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """The parent's; checkpoints that it would delete are deleted after it."""
        with self.checkpoints.hidden(Path(self._get_output_dir(trial))):
            return super()._finalize_training(trial, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self.checkpoints.part():
            if self.shards.is_on:
                self.shards.save(output_dir, self.model, self.optimizer, self.lr_scheduler)  # pyright: ignore
            else:
                super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.shards.reads(checkpoint):
            self.shards.restore(checkpoint, self.model, self.optimizer, self.lr_scheduler)  # pyright: ignore
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.evaluation_weights.put(False)  # the first step samples before it trains
            self.errors.run(lambda: self.run_state.restore(Path(checkpoint), self.accelerator.process_index))

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The parent's, after which what was frozen is frozen, and the same adapters are active."""
        with kept_flags(self.model):  # pyright: ignore[reportArgumentType]
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        self.checkpoints.check_best()
        self.evaluation_weights.put(True)  # those are what was saved
        with kept_flags(self.model):  # pyright: ignore[reportArgumentType]
            if self.shards.is_on:
                self.shards.restore_weights(self.state.best_model_checkpoint, self.model, self.optimizer)  # pyright: ignore
            else:
                super()._load_best_model()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The parent's, once for each pass of the micro-batch; gradients add up; ranks exchange them in the last."""

        def one_pass(rows: PackedRows, last: bool) -> torch.Tensor:
            with self.sharding.one_pass(model, last):
                return super(GuardedTrainer, self).training_step(model, {"rows": rows}, num_items_in_batch)

        *others, last = inputs["passes"]
        losses = [self.passes.run(rows, one_pass, last=False) for rows in others]
        return torch.stack([*losses, self.passes.run(last, one_pass, last=True)]).sum()

    def _on_skip(self, pairs: int) -> None:
        self.metrics.total("guard/skipped_pairs", pairs / self.accelerator.num_processes)
        self._check_finite("In a step that was skipped")  # then no further step would be better

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """The parent's, over the rows that the policy reads: a prompt that completions share counts once."""
        super()._track_num_input_tokens(tokens_read(inputs["passes"]))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The parent's, over the same rows."""
        of_rows = super().floating_point_ops
        return sum(of_rows({"input_ids": rows.tokens.ids_RT}) for rows in inputs["passes"])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = full(norm) if isinstance(norm, torch.Tensor) else norm
        self.guard.saw_gradient_norm(norm)  # pyright: ignore[reportArgumentType]
        return norm

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The parent's, which knows no tied weights."""
        forget_tied_names(self.model, load_result.missing_keys)  # pyright: ignore[reportArgumentType]
        super()._issue_warnings_after_load(load_result)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent's; the log of a training step gains the metrics collected since the last one."""
        if "loss" in logs:
            self.metrics.ratio("train/updated_ratio", *self.updates.drain_changed())
            logs = self.log_state.step_log(self.backoff.in_log(logs), self.guard.skipped)
        if self.state.epoch is not None:
            logs = {"epoch": self.state.epoch, **logs}  # the parent would put it last
        super().log(logs, start_time)
        last = self.state.log_history[-1]
        self.state.log_history[-1] = {"step": last["step"], **last}
