"""`ObjectiveStep`, built alone: the loss of a pass by hand, micro-batches as many as were fetched, totals."""

import pytest
import torch
from transformers import TrainerState

from online_dpo.distributed.sharding import sharding_for
from online_dpo.methods import METHODS
from online_dpo.modeling.logprobs import enable_logprobs
from online_dpo.modeling.reference import FrozenReference, NoReference
from online_dpo.objective.beta import Beta
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.objective_step import ObjectiveStep
from online_dpo.training.pass_size import PassSize
from online_dpo.types import Pair
from support import tiny
from support.stages import context
from support.training import config


def step(tmp_path, reference=None, **fields):
    args = config(tmp_path, **fields)
    metrics = MetricStore()
    reference = reference or FrozenReference(ready(seed=1), "another model")
    run = context(metrics, TrainerState)
    size = PassSize(args, sharding_for(run.accelerator, lambda: None), lambda: None, torch.device("cpu"))
    made = ObjectiveStep(args, METHODS[args.method], reference, Beta(args, lambda: None), run, size)
    return made, metrics


def ready(seed=0):
    model = tiny.causal_lm(seed=seed, sharpness=1.0)
    enable_logprobs(model)
    return model


def pairs(weights=(1.0, 1.0, 1.0)):
    groups = [
        tiny.group(prompt, [[5 + p, 6, 1], [7, 8 + p, 9, 10]]) for p, prompt in enumerate(tiny.prompts([3, 5, 4]))
    ]
    return [Pair(group, 0, 1, 2.0, 1.0, weight=weight) for group, weight in zip(groups, weights, strict=True)]


@torch.no_grad()
def logp(model, prompt, completion):
    """The sum over a completion's tokens, one sequence at a time."""
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    start = len(prompt.token_ids)
    return float(sum(logps[start - 1 + i, token] for i, token in enumerate(completion.token_ids)))


def by_hand(policy, reference, pair, beta=0.1):
    margin = sum(
        sign * (logp(policy, pair.group.prompt, c) - logp(reference, pair.group.prompt, c))
        for sign, c in ((1, pair.chosen_completion), (-1, pair.rejected_completion))
    )
    return float(-torch.nn.functional.logsigmoid(torch.tensor(beta * margin)))


@pytest.mark.smoke
@pytest.mark.parametrize("share", [True, False])
def test_the_loss_is_the_mean_of_the_pairs_of_the_whole_step(tmp_path, share):
    made, metrics = step(tmp_path, share_prompts=share)
    policy = ready().train()
    some = pairs()
    expected = [by_hand(policy, made.reference.model, pair) for pair in some]
    inputs = made.pack(policy, some, 2)
    assert len(inputs) == 2 and made.totals(some) == (3, 3.0)
    losses = [made.losses(policy, rows, torch.tensor(3.0)) for batch in inputs for rows in batch["passes"]]
    assert sum(float(one.loss.detach()) for one in losses) == pytest.approx(sum(expected) / 3, rel=1e-5)
    found = sorted(float(value) for one in losses for value in one.loss_N.detach() if value > 0)
    assert found == pytest.approx(sorted(expected), rel=1e-5)
    assert metrics.drain()["loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_weights_count_in_the_mean_and_an_empty_micro_batch_counts_nothing(tmp_path):
    made, _ = step(tmp_path)
    policy = ready().train()
    some = pairs(weights=(1.0, 3.0, 0.5))
    expected = [by_hand(policy, made.reference.model, pair) * pair.weight for pair in some]
    inputs = made.pack(policy, some, 5)  # more micro-batches than groups
    count, weight = made.totals(some)
    assert len(inputs) == 5 and (count, float(weight)) == (3, 4.5)
    losses = [float(made.losses(policy, rows, weight).loss.detach()) for batch in inputs for rows in batch["passes"]]
    assert sum(losses) == pytest.approx(sum(expected) / 4.5, rel=1e-5) and losses.count(0.0) == 2


def test_a_step_without_pairs_has_a_total_of_one(tmp_path):
    made, _ = step(tmp_path)
    count, weight = made.totals([])
    assert (count, float(weight)) == (0, 1.0)
    [inputs] = made.pack(ready(), [], 1)
    [rows] = inputs["passes"]
    assert float(made.losses(ready().train(), rows, weight).loss.detach()) == 0.0


def test_passes_are_cut_by_tokens(tmp_path):
    made, _ = step(tmp_path, max_tokens_per_pass=12)
    [inputs] = made.pack(ready(), pairs(), 1)
    assert [len(rows.pairs) for rows in inputs["passes"]] == [1, 1, 1]


def test_without_a_reference_nothing_is_asked_and_nothing_recorded(tmp_path):
    made, metrics = step(tmp_path, reference=NoReference(), loss_type="simpo", reference_free=True)
    [inputs] = made.pack(ready(), pairs(), 1)
    result = made.losses(ready().train(), inputs["passes"][0])
    assert result.reference is None and result.outputs().keys() == {"loss_N", "policy", "reference"}
    names = metrics.drain().keys()
    assert "loss" in names and not [name for name in names if name.startswith("rewards/") or name == "objective/kl"]


def test_an_evaluation_packs_the_completions_of_groups_without_a_pair_too(tmp_path):
    made, metrics = step(tmp_path)
    some = pairs()
    inputs = made.pack_for_evaluation(ready(), [pair.group for pair in some], some[:1])
    result = made.losses(ready().eval(), inputs["rows"])
    assert result.policy.logps_S.shape == (6,) and result.loss_N.shape == (1,)
    assert metrics.drain() == {}  # training alone is recorded
