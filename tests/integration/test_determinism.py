"""Runs with `full_determinism`, with the operations refused that have no deterministic form on a GPU."""

import os

import pytest
import torch

from online_dpo.errors import ForeignCodeError
from online_dpo.rollout.builtin import sampling
from online_dpo.training.build import train_on_one_device_per_process
from support import tiny
from support.determinism import RefusingAsOnGpus
from support.training import LORA, config, dataset, train_logs, trainer, weights

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "FLASH_ATTENTION_DETERMINISTIC")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """transformers sets these for the whole process."""
    for name in VARIABLES + ("ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "fields",
    [
        dict(top_p=0.9, min_p=0.01, temperature=0.9),
        dict(family="qwen2", bf16=True, gradient_checkpointing=True),
        dict(family="gpt2", share_prompts=False, repetition_penalty=1.2),
        dict(family="gemma2", loss_type="ipo", num_completions=3),
        dict(method="nash_md", top_p=0.9),
        dict(method="xpo", family="qwen3"),
        dict(lora=True, eval_strategy="steps", eval_steps=1),
    ],
    ids=lambda fields: "-".join(map(str, fields)),
)
def test_a_run_takes_no_operation_that_a_gpu_refuses(tmp_path, monkeypatch, fields):
    """Sampling, forward and backward passes, the update, metrics, an evaluation; by the ways of a GPU to draw."""
    from peft import LoraConfig

    monkeypatch.setattr(sampling, "may_refuse_cumsum", lambda device: True)
    fields = dict(fields)
    kwargs = dict(peft_config=LoraConfig(**LORA)) if fields.pop("lora", False) else {}
    kwargs["eval_dataset"] = dataset((3, 5))
    model = tiny.causal_lm(fields.pop("family", "llama"), sharpness=1.0)
    made = trainer(tmp_path, model, full_determinism=True, max_steps=2, kwargs=kwargs, **fields)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    before = weights(made.model)
    with RefusingAsOnGpus():
        made.train()
    assert len(train_logs(made)) == 2
    assert any(not torch.equal(p, before[name]) for name, p in made.model.named_parameters())


def test_cublas_is_told_before_a_model_is_loaded(tmp_path):
    """It reads the variable at its first product; transformers sets it only when its `Trainer` is made."""
    train_on_one_device_per_process(config(tmp_path))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    train_on_one_device_per_process(config(tmp_path, full_determinism=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_of_the_model_that_a_gpu_refuses_is_told_with_the_setting(tmp_path):
    refusal = "kthvalue CUDA does not have a deterministic implementation, but you set 'torch.use_determin...(True)'."

    def refuse(module, args, output):
        if module.training:
            raise RuntimeError(refusal)

    made = trainer(tmp_path, full_determinism=True)
    made.model.get_submodule("model.layers.1.mlp").register_forward_hook(refuse)
    with pytest.raises(
        ForeignCodeError, match="`full_determinism`: in step 1 .* kthvalue .* `full_determinism: false`"
    ):
        made.train()
