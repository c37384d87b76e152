"""Policies that are adapters: what is trained, what is saved, and the reference with the adapter off."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from online_dpo.modeling.reference import AdapterOffReference
from support import tiny
from support.training import LORA, gradient, train_logs, trainer, weights


@pytest.mark.parametrize("pre_wrapped", [False, True])
def test_an_adapter_is_trained_and_switched_off_for_the_reference(tmp_path, pre_wrapped):
    base = tiny.causal_lm(sharpness=1.0)
    before = weights(base)
    model = get_peft_model(base, LoraConfig(**LORA)) if pre_wrapped else base
    made = trainer(
        tmp_path,
        model=model,
        kwargs={} if pre_wrapped else {"peft_config": LoraConfig(**LORA)},
        max_steps=3,
        learning_rate=0.05,
        per_device_train_batch_size=12,
        gradient_checkpointing=True,
    )
    assert isinstance(made.reference, AdapterOffReference)
    made.train()
    logs = train_logs(made)
    assert logs[0]["objective/kl"] == pytest.approx(0, abs=1e-5) and abs(logs[2]["objective/kl"]) > 1e-3
    unwrapped = made.model.get_base_model()
    for name, value in before.items():
        wrapped = (
            name.replace("_proj.weight", "_proj.base_layer.weight") if ("q_proj" in name or "v_proj" in name) else name
        )
        assert torch.equal(unwrapped.get_parameter(wrapped), value), name
    with made.reference.active() as reference:
        ids = torch.arange(4, 12)[None]
        torch.testing.assert_close(reference(ids).logits, tiny.causal_lm(sharpness=1.0)(ids).logits)

    made.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(tiny.causal_lm(sharpness=1.0), tmp_path / "final").eval()
    torch.testing.assert_close(loaded(ids).logits, made.model.eval()(ids).logits)


def test_gradient_checkpointing_does_not_change_an_adapters_gradient(tmp_path):
    def adapters(checkpointing):
        torch.manual_seed(3)
        model = get_peft_model(tiny.causal_lm(sharpness=1.0), LoraConfig(**LORA, init_lora_weights=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gradient(tmp_path, model=model, gradient_checkpointing=checkpointing)

    on, off = adapters(True), adapters(False)
    assert on.keys() == off.keys() and all("lora" in name for name in on)
    for name in off:
        torch.testing.assert_close(on[name], off[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chosen", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_with_virtual_tokens_are_refused(tmp_path, chosen):
    """Their positions depend on padding: the same tokens get other log-probabilities in another batch."""
    with pytest.raises(ValueError, match="virtual tokens.*LoRA"):
        trainer(tmp_path, kwargs={"peft_config": chosen(task_type="CAUSAL_LM", num_virtual_tokens=4)})


def test_an_adapter_that_was_trained_before_is_pointed_out(tmp_path, caplog):
    model = get_peft_model(tiny.causal_lm(), LoraConfig(**LORA, init_lora_weights=False))
    trainer(tmp_path, model=model)
    assert "has been trained before" in caplog.text
    caplog.clear()
    trainer(tmp_path, model=get_peft_model(tiny.causal_lm(), LoraConfig(**LORA)))
    assert "has been trained before" not in caplog.text
