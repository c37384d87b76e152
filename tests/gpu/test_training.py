"""bf16 under autocast in training: the head, references, whole runs. Values are those of fp64, or of the same run cut
in another way.

Tolerances. The head adds its products in fp32, so that with inputs that are given in bf16, which fp64 gets as well, its
log-probabilities are right to about 1e-3, or to 2^-9 of a logit where a product is stored in bf16 (logits here are
below 8: 2e-2). Gradients are multiplied in bf16: 2^-9 for each factor, 2 % with room.
"""

import logging
import math

import pytest
import torch
from peft import LoraConfig

from online_dpo.modeling.fused_head import linear_logprobs
from online_dpo.modeling.reference import frozen_copy
from support.on_gpu import model, relative
from support.training import KeepGradient, dataset, step_logs, train_logs, trainer, weights

LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
VARIANTS = {
    "plain": ({}, {}),
    "gradient checkpointing": (dict(gradient_checkpointing=True), {}),
    "LoRA": ({}, dict(peft_config=LORA)),
    "LoRA, gradient checkpointing": (dict(gradient_checkpointing=True), dict(peft_config=LORA)),
    "padded rows": (dict(share_prompts=False), {}),
    "bf16 off": (dict(bf16=False), {}),
}


def made_trainer(tmp_path, device, kwargs=None, **fields):
    """A trainer on the device, in bf16."""
    options = dict(use_cpu=device.type == "cpu", bf16=True, max_new_tokens=24, per_device_train_batch_size=8)
    one = model("llama", device, sharpness=1.0)
    return trainer(tmp_path, model=one, kwargs=kwargs, **(options | fields))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype, atol, rtol", [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 2e-2, 2e-2)])
def test_the_head_by_value(dtype, atol, rtol, entropy, frozen, device):
    generator = torch.Generator().manual_seed(0)
    hidden_MH = torch.randn(500, 256, generator=generator).to(dtype)
    weight_VH = (0.08 * torch.randn(5003, 256, generator=generator)).to(dtype)
    target_M = torch.randint(5003, (500,), generator=generator).to(device)
    factor_M = torch.linspace(-1.0, 2.0, 500).to(device)
    exact_MH, exact_VH = (x.double().to(device).requires_grad_() for x in (hidden_MH, weight_VH))
    logps_MV = (exact_MH @ exact_VH.t()).log_softmax(-1)
    right_M = logps_MV.gather(-1, target_M[:, None])[:, 0]
    (right_M * factor_M).sum().backward()

    mine_MH = hidden_MH.to(device).requires_grad_()
    mine_VH = weight_VH.to(device).requires_grad_(not frozen)
    logps_M, entropy_M = linear_logprobs(mine_MH, mine_VH, None, target_M, entropy, 128)
    assert logps_M.dtype == torch.float32
    torch.testing.assert_close(logps_M.detach().double(), right_M.detach(), atol=atol, rtol=0)
    if entropy:
        right_entropy_M = -(logps_MV.exp() * logps_MV).sum(-1)
        torch.testing.assert_close(entropy_M.double(), right_entropy_M.detach(), atol=atol, rtol=0)
    (logps_M * factor_M).sum().backward()
    assert relative(mine_MH.grad, exact_MH.grad) < rtol
    if not frozen:
        assert relative(mine_VH.grad, exact_VH.grad) < rtol


@torch.no_grad()
def test_a_reference_held_in_bf16_gives_what_one_gives_that_is_cast_in_each_pass(tmp_path, device):
    """Autocast rounds the same weights to the same numbers. A GPU may multiply them side by side, and add in another
    order.
    """
    made = made_trainer(tmp_path, device)
    policy = made.accelerator.unwrap_model(made.model)
    ids = torch.randint(4, 40, (3, 50), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device.type, torch.bfloat16), made.reference.active() as reference:
        held = reference(input_ids=ids).logits
        cast = frozen_copy(policy)(input_ids=ids).logits
    assert relative(held, cast) <= (0.0 if device.type == "cpu" else 2**-8)


@pytest.mark.parametrize("name", VARIANTS)
def test_runs_train_and_nothing_takes_a_slower_path(name, tmp_path, device, caplog):
    fields, kwargs = VARIANTS[name]
    steps = 4 if device.type == "cuda" else 1
    with caplog.at_level(logging.WARNING, logger="online_dpo"):
        made = made_trainer(tmp_path, device, kwargs, max_steps=steps, **fields)
        before = weights(made.model)
        made.train()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("online_dpo")] == []
    logs = step_logs(made)
    assert len(logs) == steps
    for log in logs:
        assert all(math.isfinite(value) for value in log.values() if isinstance(value, int | float))
        assert log["pairs/count"] > 0
    after = weights(made.model)
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(after[key], before[key]) for key in before)
    if device.type == "cuda":
        assert made.sampler.engine._path == "static"


def gradient(tmp_path, device, **fields):
    """The gradient of the first step, as one vector."""
    keep = KeepGradient()
    made = made_trainer(tmp_path, device, optim="sgd", **fields)
    made.callback_handler.callbacks.insert(0, keep)
    made.train()
    return torch.cat([g.flatten().double() for g in keep.last.values()])


def test_the_gradient_does_not_depend_on_how_a_step_is_cut_or_remembered(tmp_path, device):
    """Sums of bf16 products in another order; completions are the same, since sampling comes first."""
    whole = gradient(tmp_path / "whole", device)
    assert float(whole.norm()) > 1e-4
    for number, fields in enumerate((dict(max_tokens_per_pass=128), dict(gradient_checkpointing=True))):
        other = gradient(tmp_path / str(number), device, **fields)
        assert relative(other, whole) < 3e-2, fields


def test_the_gradient_of_a_card_is_that_of_a_cpu(tmp_path, card):
    """In fp32: the same completions are sampled, and the same sums made in another order."""
    on_card = gradient(tmp_path / "card", card, bf16=False)
    on_cpu = gradient(tmp_path / "cpu", torch.device("cpu"), bf16=False)
    assert relative(on_card.cpu(), on_cpu) < 1e-3


def test_evaluation_checkpoints_and_going_on(tmp_path, device):
    fields = dict(max_steps=2, save_strategy="steps", save_steps=1)
    made = made_trainer(tmp_path, device, dict(eval_dataset=dataset()), **fields)
    made.train()
    found = made.evaluate()
    assert found and all(math.isfinite(value) for value in found.values() if isinstance(value, int | float))
    again = made_trainer(tmp_path, device, dict(eval_dataset=dataset()), **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2 and train_logs(again)
    for name, one in weights(made.model).items():
        # a card adds in an order that may change from run to run
        assert relative(weights(again.model)[name], one) < (0 if device.type == "cpu" else 1e-3) + 1e-12, name
