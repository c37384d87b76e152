"""Run by torchrun with two processes: one of them has nothing to do, or fails, where all have to come together. Each
case is a run of its own, whose end each rank saves; a rank that waits for one that has gone ends with an error after
`ddp_timeout`.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaForSequenceClassification

from online_dpo.data.collate import collate_prompts
from online_dpo.distributed.collectives import from_every_rank, from_first_rank
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import Stream
from online_dpo.rollout.registry import engine
from support import tiny
from support.training import dataset, trainer, word_reward

LAST = os.environ.get("RANK") == "1"


class TogetherEngine(TransformersEngine):
    """Engines may ask other ranks: servers when they take weights, engines over several ranks when they sample."""

    has_own_weights = True
    calls: list[str] = []

    def sync(self, model, version):
        super().sync(model, version)
        assert from_first_rank(("weights", version)) == ("weights", version)

    def generate(self, prompts, num_completions, params, key):
        TogetherEngine.calls.append(f"{Stream(key.stream).name} {len(prompts)}")
        assert len(from_every_rank(key.stream)) == 2
        groups = super().generate(prompts, num_completions, params, key)
        if LAST and key.stream == FAILS_IN.get("stream"):
            raise ConnectionError("the device is gone")
        return groups


FAILS_IN: dict[str, int] = {}


@engine("together")
def build(policy, tokenizer, args):
    return TogetherEngine(policy, tokenizer, args.rollout_batch_size)


def without_usable_prompts(rows):
    batch = collate_prompts(rows)
    return {**batch, "prompt_invalid": ["for this test"] * len(rows)} if LAST else batch


def with_an_unknown_token(rows):
    batch = collate_prompts(rows)
    return {**batch, "prompt_ids": [[*ids, 10**6] for ids in batch["prompt_ids"]]} if LAST else batch


def broken(rows):
    if LAST:
        raise OSError("a row that cannot be read")
    return collate_prompts(rows)


class Evaluated:
    """A collator for evaluations alone: those of training have 4 rows a rank, those of evaluations 2."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows):
        return self.collate(rows) if len(rows) == 2 else collate_prompts(rows)


def reward_model():
    torch.manual_seed(1)
    return LlamaForSequenceClassification(tiny.config("llama", num_labels=1, pad_token_id=0))


def fails_on_the_last_rank(completions, **_):
    if LAST:
        raise ConnectionError("the reward is away")
    return [0.0] * len(completions)  # no pair: the prompts are answered again


EVALUATED = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2)
SHARDED = dict(
    fsdp=True, fsdp_config={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}, reward_model_sharding="shard"
)
CASES = {
    "an evaluation without prompts": dict(collate=Evaluated(without_usable_prompts), max_steps=2, **EVALUATED),
    "an evaluation first": dict(collate=Evaluated(without_usable_prompts), only_evaluates=True, **EVALUATED),
    "a step without prompts": dict(collate=without_usable_prompts),
    "an unknown token in an evaluation": dict(collate=Evaluated(with_an_unknown_token), **EVALUATED),
    "unreadable prompts of an evaluation": dict(collate=Evaluated(broken), **EVALUATED),
    "an unknown token": dict(collate=with_an_unknown_token),
    "unreadable prompts": dict(collate=broken),
    "an engine that fails": dict(fails_in=Stream.TRAINING, **SHARDED),
    "a reward that fails": dict(reward_funcs=fails_on_the_last_rank, resample_rounds=1),
    "an engine that fails in the check": dict(fails_in=Stream.SYNC_CHECK),
    "an engine that fails in an evaluation": dict(fails_in=Stream.EVALUATION, **EVALUATED),
}


def run(out, case, collate=None, only_evaluates=False, fails_in=None, **options):
    if "reward_model_sharding" in options:
        options["reward_funcs"] = reward_model()
        kwargs = {"reward_processing_classes": tiny.tokenizer()}
    else:
        options["reward_funcs"], kwargs = options.get("reward_funcs", word_reward), {}
    TogetherEngine.calls, FAILS_IN["stream"] = [], fails_in
    made = trainer(
        out / case,
        engine="together",
        ddp_timeout=120,
        train_sampling_strategy="sequential",
        train_dataset=dataset(lengths=(5, 9, 3, 7, 12, 4, 6, 8) * 2),
        kwargs={**kwargs, "eval_dataset": dataset(lengths=(3, 4, 5, 6)), "data_collator": collate},
        **options,
    )
    started, ended = time.monotonic(), {"error": None, "metrics": None}
    try:
        if only_evaluates:
            ended["metrics"] = made.evaluate()
        else:
            made.train()
            ended["metrics"] = [log for log in made.state.log_history if "eval_loss" in log]
    except Exception as error:
        ended["error"] = f"{type(error).__name__}: {error}"
    ended |= {"seconds": time.monotonic() - started, "step": made.state.global_step, "calls": TogetherEngine.calls}
    (out / f"{case} {int(LAST)}.json").write_text(json.dumps(ended))


def main():
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for case in sys.argv[2:] or CASES:
        run(out, case, **CASES[case])


if __name__ == "__main__":
    main()
