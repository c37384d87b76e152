"""`OnlineDPOTrainer`: composes the stages of Online DPO on top of `transformers.Trainer`, and nothing else.

Reading order: ``get_batch_samples`` is one optimizer step up to its micro-batches, ``compute_loss`` is the rest.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from threading import Event
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from online_dpo.config.keyword_arguments import NamedArguments
from online_dpo.config.names_elsewhere import ARGUMENTS, hint_for
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.collate import UsersCollator, collate_prompts, prompts_from_batch
from online_dpo.data.cut import CutPromptsCallback
from online_dpo.data.prompts import PREPARED_COLUMNS, prepare_prompts
from online_dpo.data.stream import EndlessStream
from online_dpo.errors import ForeignCodeError
from online_dpo.evaluation.gold import check_gold
from online_dpo.evaluation.predictions import Predictions
from online_dpo.evaluation.records import EvalRecord, eval_records, mean_notes, summarise
from online_dpo.foreign import callable_name, foreign
from online_dpo.modeling.borrowing import eval_mode, restores_models_on_error
from online_dpo.modeling.forward_path import ModelContext, PathChoice
from online_dpo.modeling.introspection import end_token_ids
from online_dpo.modeling.known_tokens import (
    VocabularyCheck,
    check_options,
    check_policy,
    check_reference,
    embedding_rows,
)
from online_dpo.modeling.logprobs import RowLogprobs, row_logprobs
from online_dpo.modeling.onednn import onednn_linears
from online_dpo.modeling.reference import ReferenceSteps
from online_dpo.objective.beta import Beta
from online_dpo.objective.inputs import LossOptions, pair_logprobs
from online_dpo.objective.losses import method_losses
from online_dpo.packing.microbatches import passes_needed, split_pairs
from online_dpo.packing.pack import as_inputs, by_group, pack_groups, pack_pairs, stand_in
from online_dpo.pairing.rounds import latest
from online_dpo.pairing.select import Selection
from online_dpo.rollout.lookahead import Lookahead
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from online_dpo.rollout.sync_check import SyncCheck
from online_dpo.scoring.judge_registry import build_judge
from online_dpo.scoring.notes import noting
from online_dpo.scoring.registry import build_scorers
from online_dpo.training.arguments import (
    check_arguments,
    check_batches,
    check_columns,
    check_stream,
    check_templates,
    checked_config,
    choose_scorers,
    named_datasets,
)
from online_dpo.training.build import (
    build_engine,
    build_opponent,
    build_policy,
    build_reference,
    built_in_engine,
    train_on_one_device_per_process,
)
from online_dpo.training.display.figures import in_order
from online_dpo.training.feedback_trainer import FeedbackTrainer
from online_dpo.training.metrics import STEP_KL, record_loss, record_pairs, record_resampling, trained_kl
from online_dpo.training.model_card import as_list, write_model_card
from online_dpo.training.trl_attributes import TRLAttributes
from online_dpo.types import Completion, Group, PackedRows, Pair, Prompt

logger = logging.getLogger(__name__)


class OnlineDPOTrainer(NamedArguments, TRLAttributes, FeedbackTrainer):
    """Aligns a language model with preferences collected while it trains (Guo et al. 2024, arXiv 2402.04792).

    Args:
        model: the policy: a causal language model, a PEFT model, a folder or a hub name.
        ref_model: the reference; when not given, a frozen copy of the policy, or the policy with its adapter off.
        reward_funcs: one or several of: a Python function (plain or async), a sequence-classification model, its folder
            or hub name.
        judge: a :class:`PairwiseScorer` such as ``LLMJudge``; the folder or hub name of a pairwise model; a function of
            ``prompt, first, second`` that returns the probability that the first is better; or an object with
            ``judge(prompts, completion_pairs, shuffle_order=True) -> ranks``, or a callable of that form: a rank is 0
            or 1 for the better completion, -1 for no answer. Beside a reward it is used with ``judge_top`` alone.
        reward_model: another name for ``reward_funcs``.
        args: the configuration.
        data_collator: list of rows to a dict of lists; must keep the columns ``prompt``, ``prompt_ids``,
            ``prompt_row``, ``prompt_invalid`` and ``prompt_cut``.
        train_dataset, eval_dataset: rows with a ``prompt`` (text or messages); ``eval_dataset`` may be a dict of them.
            Other columns are handed to reward functions.
        processing_class: the policy's tokenizer.
        reward_processing_classes: tokenizers of the reward models, in the order of ``reward_funcs``.
        peft_config: adapter to train instead of the whole model.
        eval_reward_funcs, eval_judge: gold, in the forms of ``reward_funcs`` and ``judge``: evaluations report what it
            says beside the training score, and training never sees it.
        compute_metrics: receives `EvalPrediction(predictions=scores (prompts, K), label_ids=reference scores
            (prompts,))`.

    Raises:
        ValueError, TypeError: an argument is missing or wrong; raised before any model is loaded where that is
            possible.
        InvalidPromptError: a dataset row is no usable prompt (see ``invalid_prompts``).
    """

    @restores_models_on_error
    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        ref_model: PreTrainedModel | nn.Module | str | None = None,
        reward_funcs: Any = None,
        judge: Any = None,
        reward_model: Any = None,
        args: OnlineDPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: Any = None,
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        eval_reward_funcs: Any = None,
        eval_judge: Any = None,
    ) -> None:
        args = checked_config(args)
        reward_funcs, judge = choose_scorers(reward_funcs, reward_model, judge, args)
        check_arguments(
            model=model,
            ref_model=ref_model,
            reward_funcs=reward_funcs,
            judge=judge,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            peft_config=peft_config,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        assert processing_class is not None
        check_gold(eval_reward_funcs, eval_judge, args)
        self.tokenizer: PreTrainedTokenizerBase = getattr(processing_class, "tokenizer", processing_class)  # pyright: ignore
        self.args = args
        self.dropped_rows: Counter[str] = Counter()
        train_dataset = self._prepared(train_dataset, "train_dataset")
        if isinstance(train_dataset, IterableDataset):
            check_stream(args)
            callbacks = [*(callbacks or []), CutPromptsCallback("train_dataset")]
            train_dataset = EndlessStream(train_dataset)  # pyright: ignore[reportAssignmentType]
        check_batches(train_dataset, args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepared(data, f"eval_dataset[{name!r}]") for name, data in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepared(eval_dataset, "eval_dataset")
        if data_collator is None:  # one's own may add columns
            looked_at = named_datasets(eval_dataset) if args.eval_strategy != "no" else {}
            check_columns(reward_funcs, {"train_dataset": train_dataset, **looked_at}, PREPARED_COLUMNS)
            check_columns(eval_reward_funcs, looked_at, PREPARED_COLUMNS)
        train_on_one_device_per_process(args)

        set_seed(args.seed)  # an adapter's first weights are random
        policy = build_policy(model, peft_config, args, optimizers[0])
        prepared = {"train_dataset": train_dataset, **named_datasets(eval_dataset)}
        check_policy(policy, self.tokenizer, prepared)
        check_options(policy, args.generation_kwargs or {})  # pyright: ignore[reportArgumentType]
        super().__init__(
            model=policy,
            args=args,
            data_collator=collate_prompts if data_collator is None else UsersCollator(data_collator),
            train_dataset=train_dataset,  # pyright: ignore[reportArgumentType]
            eval_dataset=eval_dataset,  # pyright: ignore[reportArgumentType]
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.reference = build_reference(ref_model, policy, args)
        self.readers = VocabularyCheck({"the policy": embedding_rows(policy)})
        if ref_model is not None:
            with self.reference.active() as reference:
                check_reference(reference, policy, self.tokenizer, prepared)
                self.readers = VocabularyCheck({**self.readers.rows, "the reference": embedding_rows(reference)})
        self.add_callback(ReferenceSteps(self.reference))
        self.policy = policy
        self.engine = build_engine(policy, self.tokenizer, args)
        if not args.reference_free:
            with self.reference.active() as reference:
                self.reference_engine = built_in_engine(reference, self.tokenizer, args)
        self.opponent = build_opponent(policy, self.reference, self.tokenizer, args, lambda: self.state.epoch or 0.0)
        self.adaptive_beta = Beta(args, lambda: self.metrics.take_mean(STEP_KL))
        self.add_callback(self.adaptive_beta)
        self.selection = Selection.from_config(args)
        self.loss_options = LossOptions.from_config(args)
        self.sampling = SamplingParams.from_config(args, end_token_ids(policy, self.tokenizer))
        self.judge = None if judge is None else build_judge(judge, self.tokenizer, args)
        self.scorers = (
            []
            if reward_funcs is None
            else build_scorers(reward_funcs, reward_processing_classes, args, state=lambda: self.state)
        )
        check_templates(self.scorers, train_dataset)
        self.watch_gold(eval_reward_funcs, eval_judge)
        self.lookahead = Lookahead(args.max_staleness)
        self.nobody_samples = Event()
        self.nobody_samples.set()
        self.sync_check = SyncCheck(self.accelerator, args.sync_check_steps)
        self.choice = PathChoice(self.accelerator, args.share_prompts)
        self.reference_completions: dict[tuple[int, tuple[int, ...]], tuple[Completion, ...]] = {}

    @classmethod
    def _hint_for_argument(cls, name: str, known: Collection[str]) -> str:
        if name in OnlineDPOConfig.__dataclass_fields__:
            return f" `{name}` is a field of `OnlineDPOConfig`, which is given as `args`."
        return hint_for(name, known, ARGUMENTS)

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """The first five stages, for all micro-batches of a step at once: fetch, sample, score, pair, pack.

        With ``max_staleness``, the first three of the next steps begin here as well.
        """
        fetched, feedback, waited = self._take(epoch_iterator, num_batches)
        self._record(fetched, feedback, waited)
        pairing = self._form_pairs(*latest(feedback), self.state.global_step)
        record_pairs(self.metrics, len(feedback.groups), pairing)
        if self.args.resample_rounds:
            record_resampling(self.metrics, feedback.further, pairing)
        micro_batches = self._pack(pairing.pairs, fetched.num_batches)
        return micro_batches, self._weight_over_ranks(pairing.pairs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The last two stages: log-probabilities of policy and reference, and the loss.

        The sum of the pairs' losses over the number of pairs in the whole step (their mean by weight, if they have
        weights), over all ranks and micro-batches; times the number of ranks, because data parallelism averages
        gradients over them.
        """
        rows: PackedRows = inputs["rows"].to(self.accelerator.device)
        with self.phase("reference") if model.training else nullcontext():
            reference = self._reference_logprobs(rows)  # first: no activations of the policy are held meanwhile
        policy = row_logprobs(model, rows, chunked=self.choice.path.chunked)

        options = self._loss_options_now()
        loss_N = method_losses(pair_logprobs(rows, policy, reference), options)
        if num_items_in_batch is None:
            loss = (loss_N * rows.weight_N).sum() / _or_one(rows.weight_N.sum())
        else:
            loss = (loss_N * rows.weight_N).sum() / num_items_in_batch * self.accelerator.num_processes
        if model.training:
            self.guard.saw_loss(loss)
            record_loss(self.metrics, rows, policy, reference, loss_N, options.beta)
            if self.adaptive_beta.adapts and reference is not None:
                self.metrics.mean(STEP_KL, trained_kl(rows, policy, reference))
        return (loss, {"loss_N": loss_N, "policy": policy, "reference": reference}) if return_outputs else loss

    # --- the stages -------------------------------------------------------------------------------------------------

    def _pack(self, pairs: list[Pair], num_batches: int) -> list[dict[str, Any]]:
        """Exactly as many micro-batches as were fetched: `Trainer` counts them to find the optimizer step."""
        self.done_in_step = []
        self._settle_path([members[0].group for members in by_group(pairs)])
        shared, capacity = self.choice.path.shared, self.args.row_capacity
        parts = split_pairs(pairs, num_batches)
        passes = self._most_over_ranks([passes_needed(part, self.args.tokens_per_pass) for part in parts])
        packed = [
            [pack_pairs(piece, shared, capacity) if piece else stand_in(shared) for piece in split_pairs(part, count)]
            for part, count in zip(parts, passes, strict=True)
        ]
        return [as_inputs(rows) for rows in packed]

    def _most_over_ranks(self, counts: list[int]) -> list[int]:
        """Each count's maximum over ranks: passes are collective operations, so every rank makes equally many."""
        mine = torch.tensor([counts], device=self.accelerator.device)
        return self.accelerator.gather(mine).amax(dim=0).tolist()  # pyright: ignore[reportAttributeAccessIssue]

    def _settle_path(self, groups: Sequence[Group]) -> None:
        policy: Any = self.model
        models: dict[str, ModelContext] = {"the policy": lambda: eval_mode(policy)}
        if not self.args.reference_free:
            models["the reference"] = self.reference.active
        with self.accelerator.autocast():
            self.choice.settle(models, groups)

    def _weight_over_ranks(self, pairs: list[Pair]) -> torch.Tensor:
        """What all pairs of the step count together; 1 where there are none."""
        mine = torch.tensor([float(len(pairs)), sum(pair.weight for pair in pairs)], device=self.accelerator.device)
        count, weight = self.accelerator.reduce(mine, reduction="sum")
        self.guard.expect(int(count))
        return _or_one(weight)

    @torch.no_grad()
    def _reference_logprobs(self, rows: PackedRows) -> RowLogprobs | None:
        if self.args.reference_free:
            return None
        with self.accelerator.autocast(), self.reference.active() as reference, onednn_linears(reference, pack=False):
            return row_logprobs(reference, rows, entropy=False, chunked=self.choice.path.chunked)

    def _loss_options_now(self) -> LossOptions:
        epoch = self.state.epoch or 0.0
        return self.loss_options.now(self.adaptive_beta.at(epoch), self.args.at_epoch("xpo_alpha", epoch))

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, scores, KL and win rate against the reference on held-out prompts, as ``eval_loss``, ``eval_win_rate``
        and so on; ``eval_gold_score`` and ``eval_gold_win_rate`` by the gold scorer.

        The same random numbers are used every time, so that two evaluations differ by the weights alone.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._prepared(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # pyright: ignore[reportArgumentType]

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return super().get_test_dataloader(self._prepared(test_dataset, "test_dataset"))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        logger.info("***** Running %s: batch size %d *****", description, self.args.eval_batch_size)
        model = self._wrap_model(self.model, training=False)  # pyright: ignore[reportArgumentType]
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        own_metrics = None if self.compute_metrics is None else self._own_metrics
        found = Predictions(self.args, own_metrics, loss_only)
        self.callback_handler.eval_dataloader = dataloader  # pyright: ignore[reportAttributeAccessIssue]
        with eval_mode(model), self.evaluation_weights(), noting() as notes:
            batches = iter(dataloader)
            while (batch := self.together(partial(_next_batch, batches))) is not None:
                prompts = [prompt for prompt in prompts_from_batch(batch) if prompt.invalid is None]
                mine = self.together(partial(self._evaluate_prompts, model, prompts))
                records: Any = self.accelerator.gather_for_metrics(mine, use_gather_object=True)
                is_last = self.accelerator.gradient_state.end_of_dataloader
                self.together(partial(found.add, records, is_last))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        records = found.records
        own = self.together(found.metrics)
        metrics = in_order({**mean_notes(gather_object([notes])), **summarise(records), **own})
        start = f"{metric_key_prefix}_"
        metrics = {name if name.startswith(start) else start + name: value for name, value in metrics.items()}
        predictions, label_ids = found.arrays()
        return EvalLoopOutput(predictions, label_ids, metrics, num_samples=len(records))

    def _own_metrics(self, *prediction: EvalPrediction, **options: bool) -> dict[str, Any]:
        """What the user's `compute_metrics` returns; of a batch before the last one, nothing is wanted."""
        assert self.compute_metrics is not None
        who = f"`compute_metrics` (`{callable_name(self.compute_metrics)}`)"
        with foreign(who, f"(step {self.state.global_step})", raises=ForeignCodeError):
            found = self.compute_metrics(*prediction, **options)
            return dict(found) if options.get("compute_result", True) else {}

    @torch.no_grad()
    def _evaluate_prompts(self, model: nn.Module, prompts: list[Prompt]) -> list[EvalRecord]:
        if not prompts:
            return []
        key = RolloutKey(self.args.seed, 0, Stream.EVALUATION)
        self.readers.check_prompts(prompts)
        self._sync_engine(prompts)
        with self.accelerator.autocast():
            groups = self.engine.generate(prompts, self.args.num_completions, self.sampling, key)
        self.readers.check_groups(groups)
        assessment = self._assess(groups)
        pairs = self._form_pairs(groups, assessment, step=0).pairs
        if self.accelerator.num_processes == 1:  # otherwise a step of training finds out, on all ranks together
            self._settle_path(groups)
        with self.accelerator.autocast():
            inputs = {"rows": pack_groups(groups, pairs, self.choice.path.shared, self.args.row_capacity)}
            _, outputs = self.compute_loss(model, inputs, return_outputs=True)
        reference_scores, wins = self._against_reference(groups, assessment)
        records = eval_records(groups, pairs, assessment, reference_scores, wins, inputs["rows"], **outputs)
        return self._with_gold(records, groups)

    # --- data and files ---------------------------------------------------------------------------------------------

    def _prepared(self, dataset: Any, name: str) -> Any:
        columns = getattr(dataset, "column_names", None) or []
        if set(PREPARED_COLUMNS) <= set(columns) or isinstance(dataset, EndlessStream):
            return dataset
        with self.args.main_process_first(desc=f"preparing {name}"):
            dataset, dropped = prepare_prompts(dataset, self.tokenizer, self.args, name=name)  # pyright: ignore
        self.dropped_rows += dropped
        return dataset

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | list[str] | None = None,
    ) -> None:
        """Writes README.md into the output folder: what is given, and the facts of the run."""
        if self.is_world_process_zero():
            feedback = [*self.scorers, *([] if self.judge is None else [self.judge])]
            write_model_card(
                self.args,
                self.state,
                self.policy,
                name=model_name,
                reference=self.reference.description,
                feedback=", ".join(source.name for source in feedback),
                num_processes=self.accelerator.num_processes,
                language=language,
                license=license,
                tags=as_list(tags),
                base_model=finetuned_from,
                datasets=as_list(dataset_tags),
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(model, trial)


def _next_batch(batches: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    with foreign("Reading the prompts to evaluate on", raises=ForeignCodeError):
        return next(batches, None)


def _or_one(total: torch.Tensor) -> torch.Tensor:
    return torch.where(total > 0, total, 1.0)
