"""Run by torchrun with two processes: a user's script that loads its models after it has made the configuration, while
its launcher has switched on what leaves weights out of them.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

from online_dpo import OnlineDPOTrainer
from online_dpo.distributed.weights import is_sharded
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.scoring.rewards.loading import load_reward_model
from online_dpo.scoring.rewards.model import RewardModelScorer
from support import tiny
from support.training import config, dataset, word_reward

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
GROUPS = [tiny.group(tiny.prompts([4])[0], [[5, 6, 7], [8, 9]])]


def folders(folder):
    """Folders with a policy and a reward model, of which each rank writes its own."""
    tiny.causal_lm(sharpness=1.0).save_pretrained(folder / "policy")
    torch.manual_seed(1)
    options = dict(num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(tiny.config("llama", **options)).save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tiny.tokenizer().save_pretrained(folder / name)
    return folder / "policy", folder / "reward"


def judge_of(model):
    return PairwiseModelJudge(model, tiny.tokenizer(), template="{prompt} {first} {second}", letters=("w1", "w2"))


def seen(args, policy, reward):
    """What models say that were loaded in several ways."""
    loaded = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1)
    judge = judge_of(AutoModelForCausalLM.from_pretrained(policy))
    here, _ = load_reward_model(str(reward), tiny.tokenizer())
    return {
        "score": RewardModelScorer(loaded, tiny.tokenizer()).score(GROUPS),
        "judged": judge.prefer(GROUPS),
        "loaded here": RewardModelScorer(here, tiny.tokenizer()).score(GROUPS),
    }


def with_other_value(name, rank, out):
    """The error of a run in which one value of a model is another one on the last rank."""
    torch.manual_seed(1)
    models = {
        "policy": tiny.causal_lm(sharpness=1.0),
        "reference": tiny.causal_lm(seed=3),
        "scorer 0": LlamaForSequenceClassification(tiny.config("llama", num_labels=1, pad_token_id=0)),
        "gold scorer 0": LlamaForSequenceClassification(tiny.config("llama", num_labels=1, pad_token_id=0)),
    }
    if rank == 1:
        models[name].get_input_embeddings().weight.data[3, 5] += 1e-3  # far from the 64 values of a fingerprint
    try:
        OnlineDPOTrainer(
            model=models["policy"],
            ref_model=models["reference"],
            reward_funcs=[models["scorer 0"], word_reward],
            reward_processing_classes=[tiny.tokenizer(), None],
            eval_reward_funcs=RewardModelScorer(models["gold scorer 0"], tiny.tokenizer(), name="gold"),
            args=config(out / name, eval_strategy="no"),
            train_dataset=dataset(),
            eval_dataset=dataset(),
            processing_class=tiny.tokenizer(),
        )
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def train(args, policy, reward):
    """Trains a policy that the script has loaded, with a sharded reward model, and scores as the second rank alone."""
    made = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy),
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1),
        reward_processing_classes=tiny.tokenizer(),
        args=args,
        train_dataset=dataset(),
        eval_dataset=dataset(lengths=(4,)),  # the second rank has no prompt of its own
        processing_class=tiny.tokenizer(),
    )
    made.train()
    rewards = [log["reward"] for log in made.state.log_history if "reward" in log]
    [scores] = [made.collector.assessor.assess(GROUPS if made.accelerator.process_index == 1 else []).values]
    evaluated = made.evaluate()
    return {"sharded": is_sharded(made.scorers[0].model), "rewards": rewards, "scores": scores, "evaluated": evaluated}


def main():
    torch.set_num_threads(1)
    out, way = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ["RANK"])
    policy, reward = folders(out / f"{way}-models-{rank}")
    whole = seen(None, policy, reward)  # before anything knows of sharding
    options = {"deepspeed": ZERO3} if way == "zero3" else {}
    args = config(out / way, reward_model_sharding="shard", train_sampling_strategy="sequential", **options)
    result = seen(args, policy, reward)
    result |= {f"whole {name}": value for name, value in whole.items()}
    result["trained"] = train(args, policy, reward)
    if way == "fsdp2":
        names = ("policy", "reference", "scorer 0", "gold scorer 0")
        result["other value"] = {name: with_other_value(name, rank, out) for name in names}
    torch.save(result, out / f"{way}-{rank}.pt")


if __name__ == "__main__":
    main()
