"""The stages of a run, each built by itself from real parts: no trainer around them."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from transformers import TrainerState

from online_dpo.data.collate import collate_prompts
from online_dpo.data.prompts import prepare_prompts
from online_dpo.distributed.collectives import RankErrors
from online_dpo.methods import METHODS
from online_dpo.modeling.known_tokens import VocabularyCheck, embedding_rows
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.opponent import SelfPlay
from online_dpo.rollout.params import SamplingParams
from online_dpo.rollout.sampler import Sampler
from online_dpo.rollout.sync_check import SyncCheck
from online_dpo.scoring.assess import AssessmentOptions, Assessor
from online_dpo.scoring.rewards.function import FunctionScorer
from online_dpo.training.collector import FeedbackCollector
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.work import Work
from online_dpo.training.pair_former import PairFormer
from online_dpo.training.run_context import RunContext
from online_dpo.training.stopwatch import PhaseTimer
from support import tiny
from support.training import config, dataset, word_reward

CPU = torch.device("cpu")


def sampler(args, model=None, engine=None, **changes):
    """Samples from a tiny Llama, or from ``model``."""
    model = tiny.causal_lm(sharpness=1.0) if model is None else model
    engine = TransformersEngine(model, tiny.tokenizer()) if engine is None else engine
    params = SamplingParams.from_config(args, (tiny.EOS,))
    vocabulary = VocabularyCheck({"the policy": embedding_rows(model)})
    autocast = Accelerator(cpu=True).autocast
    return Sampler(
        model, engine, params, vocabulary, SyncCheck(CPU, 0), lambda: args.seed, **{"autocast": autocast, **changes}
    )


def words(name="words", function=word_reward):
    return FunctionScorer(function, name)


def pair_former(args):
    return PairFormer(METHODS[args.method], args)


def batches(args, size=4, **columns):
    """Batches of prepared prompts, as a data loader of the trainer gives them."""
    prepared, _ = prepare_prompts(dataset(**columns), tiny.tokenizer(), args)
    return iter([collate_prompts([prepared[i + k] for k in range(size)]) for i in range(0, len(prepared), size)])


def context(metrics, state):
    """What the stages know of a run in one process on a CPU."""
    timer, work = PhaseTimer(metrics, CPU), Work(metrics)
    return RunContext(Accelerator(cpu=True), RankErrors(CPU), metrics, timer, work, state, lambda: False)


class Run:
    """A collector and what it works with; ``state`` stands where the test says."""

    def __init__(self, tmp_path, scorers=None, **fields):
        self.args = config(tmp_path, **{"max_steps": 3, **fields})
        self.state = TrainerState(global_step=0, max_steps=self.args.max_steps)
        self.metrics = MetricStore()
        self.sampler = sampler(self.args)
        self.assessor = Assessor(
            [words()] if scorers is None else scorers, None, lambda: AssessmentOptions.from_config(self.args)
        )
        run = context(self.metrics, lambda: self.state)
        former = pair_former(self.args)
        self.collector = FeedbackCollector(self.args, self.sampler, SelfPlay(), self.assessor, former, run)
