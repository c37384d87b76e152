"""`OnlineDPOTrainer`: composes the stages of Online DPO on top of `transformers.Trainer`, and nothing else.

Reading order: ``get_batch_samples`` is one optimizer step up to its micro-batches, ``compute_loss`` is the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
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

from online_dpo.config.keyword_arguments import names_unknown_arguments
from online_dpo.config.names_elsewhere import ARGUMENTS, hint_for
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.collate import UsersCollator, collate_prompts, prompts_from_batch
from online_dpo.distributed.collectives import from_every_rank, samples_of_every_rank
from online_dpo.evaluation.evaluator import Evaluator
from online_dpo.evaluation.gold import build_gold, check_gold
from online_dpo.evaluation.overoptimization import OveroptimisationGuard
from online_dpo.evaluation.predictions import Predictions, named_metrics
from online_dpo.evaluation.records import mean_notes, prefixed, summarise
from online_dpo.methods import METHODS
from online_dpo.modeling.borrowing import eval_mode, restores_models_on_error
from online_dpo.modeling.known_tokens import check_options, check_policy
from online_dpo.modeling.reference import ReferenceSteps
from online_dpo.objective.beta import Beta
from online_dpo.scoring.judge_registry import build_judge
from online_dpo.scoring.notes import noting
from online_dpo.scoring.protocols import WaitingScorer
from online_dpo.scoring.registry import build_scorers
from online_dpo.training.arguments import (
    check_arguments,
    check_templates,
    checked_config,
    choose_scorers,
    named_datasets,
    tokenizer_of,
)
from online_dpo.training.build import (
    build_policy,
    build_reference,
    build_reference_answers,
    build_sampler,
    build_vocabulary,
    train_on_one_device_per_process,
)
from online_dpo.training.collector import FeedbackCollector
from online_dpo.training.datasets import DatasetPreparer, check_reward_functions, next_batch_of_all
from online_dpo.training.display.figures import in_order
from online_dpo.training.hf_trainer import GuardedTrainer
from online_dpo.training.metrics.loss import STEP_KL
from online_dpo.training.model_card import as_list, write_model_card
from online_dpo.training.objective_step import ObjectiveStep
from online_dpo.training.pair_former import PairFormer
from online_dpo.training.reward_placement import build_assessor
from online_dpo.training.run_facts import feedback_facts, model_facts, users_parts
from online_dpo.training.same_run import check_same_data, check_same_models, same_settings
from online_dpo.training.sample_views import with_ledger
from online_dpo.training.trl_attributes import with_trl_attributes
from online_dpo.types import Feedback, Group, PackedRows, Pair

logger = logging.getLogger(__name__)


def _hint_for_argument(name: str, known: Collection[str]) -> str:
    if name in OnlineDPOConfig.__dataclass_fields__:
        return f" `{name}` is a field of `OnlineDPOConfig`, which is given as `args`."
    return hint_for(name, known, ARGUMENTS)


@with_trl_attributes
@names_unknown_arguments(_hint_for_argument)
class OnlineDPOTrainer(GuardedTrainer):
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
        eval_reward_funcs, eval_judge: the gold scorer or judge, in the forms of ``reward_funcs`` and ``judge``:
            evaluations report its scores beside the training score, and training never sees them.
        compute_metrics: receives `EvalPrediction(predictions=scores (prompts, K), label_ids=reference scores
            (prompts,))`.

    Raises:
        ValueError, TypeError: an argument is missing or wrong; raised before any model is loaded where that is
            possible.
        InvalidPromptError: a dataset row is no usable prompt (see ``invalid_prompts``).
    """

    is_encoder_decoder = False
    is_vision_model = False
    last_feedback: Feedback | None = None
    """What became of the prompts of the step that is trained on, on this process."""

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
        args = same_settings(checked_config(args))
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
        check_gold(eval_reward_funcs, eval_judge, args)
        self.args, self.tokenizer = args, tokenizer_of(processing_class)
        self.data = DatasetPreparer(self.tokenizer, args)
        self.dropped_rows = self.data.dropped
        train_dataset = self.data.prepare_training(train_dataset)
        eval_dataset = self.data.prepare_evaluation(eval_dataset)
        if data_collator is None:  # one's own may add columns
            check_reward_functions(reward_funcs, eval_reward_funcs, train_dataset, eval_dataset, args)
        datasets = {"train_dataset": train_dataset, **named_datasets(eval_dataset)}
        self.policy = self._build_policy(model, peft_config, optimizers[0], datasets)
        super().__init__(
            model=self.policy,
            args=args,
            data_collator=collate_prompts if data_collator is None else UsersCollator(data_collator),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[*(callbacks or []), *self.data.callbacks],
            optimizers=optimizers,
        )
        self._build_models(ref_model, datasets)
        self._build_feedback(reward_funcs, reward_processing_classes, judge, eval_reward_funcs, eval_judge)
        self._compose()
        self._identify(peft_config, ref_model, users_parts(data_collator, optimizers))

    def _build_policy(self, model: Any, peft_config: Any, optimizer: Any, datasets: dict[str, Any]) -> nn.Module:
        check_same_data(datasets)
        train_on_one_device_per_process(self.args)
        set_seed(self.args.seed)  # an adapter's first weights are random
        policy = build_policy(model, peft_config, self.args, optimizer)
        check_policy(policy, self.tokenizer, datasets)
        check_options(policy, self.args.generation_kwargs or {})  # pyright: ignore[reportArgumentType]
        return policy

    def _build_models(self, ref_model: Any, datasets: dict[str, Any]) -> None:
        """Builds the reference, the sampler, the reference's answers and the opponent."""
        args, policy, tokenizer = self.args, self.policy, self.tokenizer
        self.reference = build_reference(ref_model, policy, args, self.sharding)
        vocabulary = build_vocabulary(policy, None if ref_model is None else self.reference, tokenizer, datasets)
        self.add_callback(ReferenceSteps(self.reference))
        if self.reference.model is not None:
            self.finite.add("the reference", self.reference.model, frozen=not args.sync_ref_model)
        self.sampler = build_sampler(policy, vocabulary, tokenizer, args, self.accelerator)
        self.reference_answers = build_reference_answers(self.reference, self.sampler, tokenizer, args)
        self.method = METHODS[args.method]
        self.opponent = self.method.build_opponent(
            policy, self.reference, tokenizer, args, epoch=lambda: self.state.epoch or 0.0
        )
        self.adaptive_beta = Beta(args, lambda: self.metrics.take_mean(STEP_KL))
        self.add_callback(self.adaptive_beta)

    def _build_feedback(
        self, reward_funcs: Any, processing_classes: Any, judge: Any, eval_reward_funcs: Any, eval_judge: Any
    ) -> None:
        """Builds the scorers and the judge that training uses, and the gold ones of evaluations."""
        args, state = self.args, lambda: self.state
        self.judge = None if judge is None else build_judge(judge, self.tokenizer, args)
        if isinstance(self.judge, WaitingScorer):
            self.guard.max_idle_steps = None  # where nobody votes, the run has not stalled
        self.scorers = (
            [] if reward_funcs is None else build_scorers(reward_funcs, processing_classes, args, state=state)
        )
        check_templates(self.scorers, self.train_dataset)
        self.gold = build_gold(eval_reward_funcs, eval_judge, args, self.tokenizer, state=state)
        if self.gold is not None:
            check_templates(self.gold.scorers, self.train_dataset)
            if args.overoptimisation != "off":
                self.add_callback(
                    OveroptimisationGuard(args.overoptimisation == "stop", args.overoptimisation_patience)
                )

    def _compose(self) -> None:
        """Puts the stages together."""
        args, form_pairs = self.args, PairFormer(self.method, self.args)
        assessor = build_assessor(self.scorers, self.judge, args, self.sharding)
        self.collector = FeedbackCollector(args, self.sampler, self.opponent, assessor, form_pairs, self.context)
        parts = (self.reference, self.adaptive_beta, self.context, self.pass_size)
        self.objective = ObjectiveStep(args, self.method, *parts)
        self.evaluator = Evaluator(
            lambda: args.num_completions,
            self.sampler,
            assessor,
            form_pairs,
            self._losses_of,
            self.reference_answers,
            self.gold,
            self.reference.models,
        )
        self.ledger = with_ledger(self)
        self.recording.describe(self.ledger, self.policy, self.reference.description, self._sources())
        self.run_state.add(self.collector, self.reference, self.adaptive_beta)

    def _identify(self, peft_config: Any, ref_model: Any, parts: dict[str, Any]) -> None:
        """Says what the run computes with: for its checkpoints, and to the other ranks, which must do the same."""
        self.checkpoints.identity.add(
            **model_facts(self.policy, peft_config, ref_model, self.reference, self.tokenizer),
            **feedback_facts(self.scorers, self.judge, self.train_dataset, self.args),
            **parts,
        )
        check_same_models(self.policy, self.reference, self._sources(), self.gold)

    def _sources(self) -> list[Any]:
        """The scorers and the judge that training uses."""
        return [*self.scorers, *([] if self.judge is None else [self.judge])]

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """The first five stages, for all micro-batches of a step at once: fetch, sample, assess, pair, pack.

        With ``max_staleness``, the first four of the next steps begin here as well.
        """
        self.log_state.begin_step()
        self.raise_callback_failure()
        pairing, num_fetched = self.collector.collect(epoch_iterator, num_batches)
        self.last_feedback = self.collector.last
        self.ledger.begin_step(self.last_feedback)
        self.passes.begin_step()
        micro_batches = self.objective.pack(self.model, pairing.pairs, num_fetched)  # pyright: ignore[reportArgumentType]
        num_pairs, weight = self.objective.totals(pairing.pairs)
        self.guard.expect(num_pairs)
        return micro_batches, weight

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The last two stages: log-probabilities of policy and reference, and the loss (see `ObjectiveStep.losses`)."""
        rows: PackedRows = inputs["rows"].to(self.accelerator.device)
        losses = self.objective.losses(model, rows, num_items_in_batch)
        if model.training:
            self.guard.saw_loss(losses.loss)
            self.ledger.saw_pass(inputs["rows"], losses)
        return (losses.loss, losses.outputs()) if return_outputs else losses.loss

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, scores, KL and win rate against the reference on held-out prompts, as ``eval_loss``, ``eval_win_rate``
        and so on; ``eval_gold_score`` and ``eval_gold_win_rate`` by the gold scorer.

        The same random numbers are used every time, so that two evaluations differ by the weights alone.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self.data.prepare(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # pyright: ignore[reportArgumentType]

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The parent's, with prepared prompts."""
        return super().get_test_dataloader(self.data.prepare(test_dataset, "test_dataset"))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluates the prompts of a data loader; a collective operation."""
        logger.info("***** Running %s: batch size %d *****", description, self.args.eval_batch_size)
        model = self._wrap_model(self.model, training=False)  # pyright: ignore[reportArgumentType]
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        users_metrics = named_metrics(self.compute_metrics, lambda: self.state.global_step)
        predictions = Predictions(self.args, users_metrics, loss_only)
        self.callback_handler.eval_dataloader = dataloader  # pyright: ignore[reportAttributeAccessIssue]
        with self.evaluation_weights.in_model(), self.sampler.reading(model), eval_mode(model), noting() as notes:
            self._evaluate_batches(model, iter(dataloader), predictions)
        records, values = predictions.records, self.errors.run(predictions.metrics)
        metrics = in_order({**mean_notes(from_every_rank(notes)), **summarise(records), **values})
        return EvalLoopOutput(*predictions.arrays(), prefixed(metrics, metric_key_prefix), num_samples=len(records))

    def _evaluate_batches(self, model: nn.Module, batches: Iterator[dict[str, Any]], predictions: Predictions) -> None:
        while (batch := next_batch_of_all(batches, self.errors)) is not None:
            prompts = [prompt for prompt in prompts_from_batch(batch) if prompt.invalid is None]
            groups = self.errors.run(partial(self.evaluator.sample, prompts, self.collector.sync))
            own = self.errors.run(partial(self.evaluator.evaluate, model, groups))
            records = samples_of_every_rank(self.accelerator, own)
            is_last = self.accelerator.gradient_state.end_of_dataloader
            self.errors.run(partial(predictions.add, records, is_last))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _losses_of(
        self, model: nn.Module, groups: Sequence[Group], pairs: Sequence[Pair]
    ) -> tuple[PackedRows, dict[str, Any]]:
        """Returns the packed completions of all groups, and the outputs of `compute_loss` for them."""
        inputs = self.objective.pack_for_evaluation(model, groups, pairs)
        with self.accelerator.autocast():
            _, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return inputs["rows"], outputs

    @contextmanager
    def beside_training(self) -> Iterator[None]:
        """As the parent's, once nothing else asks the engine and the scorers."""
        self.collector.wait()
        with super().beside_training():
            yield

    # --- data and files ---------------------------------------------------------------------------------------------

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
            write_model_card(
                self.args,
                self.state,
                self.policy,
                name=model_name,
                reference=self.reference.description,
                feedback=", ".join(source.name for source in self._sources()),
                num_processes=self.accelerator.num_processes,
                language=language,
                license=license,
                tags=as_list(tags),
                base_model=finetuned_from,
                datasets=as_list(dataset_tags),
            )
