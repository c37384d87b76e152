"""The check of samplers that hold a base model without quantisation, beside a quantised trainer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from online_dpo.errors import OutOfSyncError
from online_dpo.rollout.builtin.engine import TransformersEngine
from support import quantized, tiny, training

LORA = dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


class Unquantized(TransformersEngine):
    """Samples from the base model without quantisation; takes each version of the adapter, until it forgets to."""

    has_own_weights = True
    forgets_from: int

    def sync(self, model, version):
        if version < self.forgets_from:
            set_peft_model_state_dict(self.model, get_peft_model_state_dict(model))
        self.version = version


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return quantized.base_folder(tmp_path_factory.mktemp("base"), sharpness=3.0)


def trained(tmp_path, base, change=lambda model: model, forgets_from=10**9, **fields):
    torch.manual_seed(11)
    made = training.trainer(
        tmp_path,
        model=base,
        model_init_kwargs={"quantization_config": quantized.NF4},
        kwargs={"peft_config": LoraConfig(**LORA)},
        sync_check_steps=1,
        **{"max_steps": 3, **fields},
    )
    sampled = get_peft_model(change(AutoModelForCausalLM.from_pretrained(base)), LoraConfig(**LORA))
    engine = Unquantized(sampled, tiny.tokenizer())
    engine.forgets_from = forgets_from
    made.sampler.engine = engine
    made.train()
    return made


def test_what_quantisation_changes_is_allowed_and_told_once(tmp_path, base, caplog):
    made = trained(tmp_path, base, learning_rate=1e-2)
    [told] = [r.getMessage() for r in caplog.records if "is quantised" in r.getMessage()]
    assert "(nf4)" in told
    logs = training.train_logs(made)
    assert all(1e-3 < log["sampling/sampling_logp_difference/mean"] < 1 for log in logs)


def another(model):
    """Surer of other tokens."""
    model.lm_head.weight.data = 3 * model.lm_head.weight.data.flip(0)
    return model


def test_another_base_model_is_found_at_once(tmp_path, base):
    with pytest.raises(OutOfSyncError, match="weights of step 0 .* where 1.0e\\+00 could be the quantisation"):
        trained(tmp_path, base, another)


def test_an_adapter_that_is_not_the_last_is_found(tmp_path, base):
    with pytest.raises(OutOfSyncError, match="weights of step [12] .* could be the quantisation"):
        trained(tmp_path, base, forgets_from=1, learning_rate=3.0)
