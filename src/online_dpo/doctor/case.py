"""The run that is examined, part by part. Each part is made when a check first asks for it, and once."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset
from transformers import AutoConfig, PreTrainedTokenizerBase

from online_dpo.config.sharding import Asked
from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.data.collate import prompts_from_batch
from online_dpo.data.prompts import prepare_prompts
from online_dpo.distributed.settings import kept_settings
from online_dpo.doctor.counts import Counts, count_parameters
from online_dpo.foreign import loading
from online_dpo.rollout.params import RolloutKey, Stream
from online_dpo.training.trainer import OnlineDPOTrainer
from online_dpo.types import Group, Prompt

T = TypeVar("T")

ELSEWHERE: dict[str, Any] = {"fsdp": None, "fsdp_config": None, "deepspeed": None}
"""Fields of several processes, which the one that examines is none of."""
MOST_SAMPLED = 64
"""Completions that are sampled, at most."""
STREAM_ROWS = 200
"""Rows of a stream that are looked at."""
SECONDS_A_CALL = 60.0
"""Seconds that a call of a reward may take here, if the run sets no limit."""


class NotThere(Exception):
    """A part of the run could not be made, and a check that came before has said why."""


@dataclass(frozen=True)
class Subject:
    """A planned run, as the command line hands it over: names, fields of `OnlineDPOConfig`, functions that load parts.

    ``reward_model`` is a folder or hub name, ``llm_judge`` and ``llm_eval_judge`` the settings of judges over HTTP,
    ``processes`` the number of those that will train, ``sharding`` how they share the weights, ``ray_address`` that of
    a cluster, where the run file has one.
    """

    model: str
    ref_model: str | None
    settings: Mapping[str, Any]
    tokenizer: Callable[[OnlineDPOConfig], PreTrainedTokenizerBase]
    train_dataset: Callable[[], Any]
    eval_dataset: Callable[[], Any]
    rewards: Callable[[], Sequence[Any]]
    gold: Callable[[], Sequence[Any]]
    judge: Callable[[OnlineDPOConfig], Any]
    eval_judge: Callable[[OnlineDPOConfig], Any]
    peft_config: Callable[[], Any]
    reward_model: str | None = None
    llm_judge: Mapping[str, Any] | None = None
    llm_eval_judge: Mapping[str, Any] | None = None
    asks_people: bool = False
    has_rewards: bool = True
    processes: int = 1
    sharding: Asked | None = None
    ray_address: str | None = None
    lora_rank: int = 0
    quantized: bool = False
    double_quantization: bool = False
    quick: bool = False


@dataclass
class Sampled:
    """Completions that the policy wrote for a few prompts, and the seconds that it took."""

    groups: list[Group]
    seconds: float


@dataclass
class Case:
    """The run that is examined. A check asks for the parts that it needs.

    Args:
        subject: the planned run.
        scratch: a folder for what the trainer would write into ``output_dir``.
    """

    subject: Subject
    scratch: Path
    notes: list[str] = field(default_factory=list)
    """Warnings that were given while parts were made."""
    too_large: bool = False
    """The models would not fit in memory here, so that they are not loaded."""
    scoring_seconds: float = 0.0
    """Seconds that the rewards took for the sampled completions."""
    _made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._failed: set[str] = set()

    @property
    def args(self) -> OnlineDPOConfig:
        """The configuration of the run, in one process."""
        return self._part("the configuration", self._make_args)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return self._part("the tokenizer", lambda: self.subject.tokenizer(self.args))

    @property
    def config(self) -> Any:
        """The policy's config."""
        return self._part("the model's config", lambda: self.config_of(self.subject.model))

    @property
    def counts(self) -> Counts:
        """How many numbers the policy's weights have."""
        return self._part("the model's size", lambda: count_parameters(self.config))

    @property
    def rows(self) -> Dataset | IterableDataset:
        """The dataset to train on, as it is read."""
        return self._part("the prompts", self.subject.train_dataset)

    @property
    def dataset(self) -> Any:
        """The prompts to train on, prepared as the run prepares them; the first ones of a stream."""
        return self._part("the prepared prompts", self._prepare)

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many rows are no usable prompts, by reason."""
        _ = self.dataset
        return self._made["dropped"]

    @property
    def trainer(self) -> OnlineDPOTrainer:
        """The trainer with its models, which samples with the built-in engine and writes into the scratch folder."""
        return self._part("the trainer", self._build_trainer)

    @property
    def rewards(self) -> tuple[list[Any], list[Any]]:
        """The rewards of training, and those of evaluations alone: functions, and paths of models."""
        return self._part("the rewards", self._load_rewards)

    @property
    def prompts(self) -> list[Prompt]:
        """A few prompts from all over the dataset."""
        return self._part("sample prompts", self._choose_prompts)

    @property
    def sampled(self) -> Sampled:
        """Completions of these prompts."""
        return self._part("sample completions", self._sample)

    @property
    def prompts_per_step(self) -> int:
        """Prompts of an optimizer step, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.subject.processes

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; ``None`` where the length of a stream decides."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        if not isinstance(self.dataset, Dataset):
            return None
        return -(-int(len(self.dataset) * self.args.num_train_epochs) // self.prompts_per_step)

    def config_of(self, path: str) -> Any:
        """Returns the config of a model in a folder or on the hub."""
        trusted = self.args.trust_remote_code
        with loading(path):
            return AutoConfig.from_pretrained(path, trust_remote_code=trusted)

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Inside, warnings are not added to the notes: a check says the same in its own words."""
        kept = len(self.notes)
        with self._noting():
            yield
        del self.notes[kept:]

    def _part(self, name: str, make: Callable[[], T]) -> T:
        """Returns a part, which is made at the first call.

        Raises:
            NotThere: it could not be made at an earlier call.
        """
        if name in self._failed:
            raise NotThere(f"there is no {name.removeprefix('the ')} to look at")
        if name not in self._made:
            try:
                with self._noting():
                    self._made[name] = make()
            except NotThere:
                raise
            except BaseException:
                self._failed.add(name)
                raise
        return self._made[name]

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Collects the warnings for users that are given inside."""
        handler = _Notes(self.notes)
        logger = logging.getLogger("online_dpo")
        logger.addHandler(handler)
        before, logger.propagate = logger.propagate, False
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = before
        self.notes += [str(one.message) for one in caught if one.category is UserWarning]

    def _make_args(self) -> OnlineDPOConfig:
        given = {**self.subject.settings, **{k: v for k, v in ELSEWHERE.items() if k in self.subject.settings}}
        given.pop("resume_from_checkpoint", None)
        return OnlineDPOConfig(**{**given, "disable_tqdm": True})

    def _prepare(self) -> Any:
        rows = self.rows
        if isinstance(rows, IterableDataset):
            rows = list(rows.take(STREAM_ROWS))
        with self.quietly():  # what is left out and what is cut has a check of its own
            prepared, self._made["dropped"] = prepare_prompts(rows, self.tokenizer, self.args)
        return prepared

    def _build_trainer(self) -> OnlineDPOTrainer:
        if self.too_large:
            raise NotThere("the models would not fit in memory")
        subject, args = self.subject, copy.copy(self.args)
        args.output_dir, args.use_vllm, args.engine, args.max_staleness = str(self.scratch), False, None, 0
        args.run_folder = False
        args.reward_timeout = args.reward_timeout or SECONDS_A_CALL
        rewards, gold = self.rewards
        trainer = OnlineDPOTrainer(
            model=subject.model,
            ref_model=subject.ref_model,
            reward_funcs=rewards or None,
            judge=subject.judge(self.args),
            args=args,
            train_dataset=self.dataset,
            eval_dataset=subject.eval_dataset(),
            processing_class=self.tokenizer,
            peft_config=subject.peft_config(),
            eval_reward_funcs=gold or None,
            eval_judge=subject.eval_judge(self.args),
        )
        trainer.finite.check_start()
        return trainer

    def _load_rewards(self) -> tuple[list[Any], list[Any]]:
        with kept_settings("Importing the run's own code"):
            return list(self.subject.rewards()), list(self.subject.gold())

    def _choose_prompts(self) -> list[Prompt]:
        dataset = self.dataset
        wanted = min(len(dataset), max(4, MOST_SAMPLED // self.args.num_completions))
        places = [round(place * (len(dataset) - 1) / max(1, wanted - 1)) for place in range(wanted)]
        return prompts_from_batch(dataset[sorted(set(places))])

    def _sample(self) -> Sampled:
        sampler, prompts = self.trainer.sampler, self.prompts
        began = time.perf_counter()
        sampler.sync(prompts, 0, 0)
        groups = sampler.sample(prompts, self.args.num_completions, RolloutKey(self.args.seed, 0, Stream.TRAINING))
        seconds = time.perf_counter() - began
        sampler.release()
        return Sampled(groups, seconds)


class _Notes(logging.Handler):
    """Keeps the messages of warnings."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self._notes.append(record.getMessage())
