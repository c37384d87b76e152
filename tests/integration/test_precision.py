"""What is trained is held in fp32, whatever a checkpoint was saved in; what is frozen costs no more than it has to."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from online_dpo.modeling.precision import check_precision, hold_linears
from support import tiny
from support.training import LORA, config, train_logs, trainer, weights

DEFAULT_RATE = 5e-7
TRAINED_BESIDE_LORA = [
    {},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"trainable_token_indices": [5, 6, 7]},
    {"bias": "lora_only"},
]


def policy(dtype=torch.bfloat16):
    """A model whose weights are numbers of the type, with biases in attention and a head of its own."""
    return tiny.causal_lm(sharpness=1.0, tie_word_embeddings=False, attention_bias=True).to(dtype)


def save(model, folder):
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def dtypes(model, trained):
    return {p.dtype for p in model.parameters() if p.requires_grad == trained}


def warned(caplog):
    return [r.getMessage() for r in caplog.records if "held in" in r.getMessage()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_is_trained_as_one_in_fp32(tmp_path, caplog, dtype):
    folder = save(policy(dtype), tmp_path / "policy")
    start = weights(policy(dtype).float())
    half, full = (
        trainer(tmp_path, model=model, learning_rate=DEFAULT_RATE, max_steps=3)
        for model in (folder, policy(dtype).float())
    )
    half.train()
    full.train()
    one, other = (
        torch.cat([(p.detach() - start[name]).flatten() for name, p in made.model.named_parameters()])
        for made in (half, full)
    )
    assert (one - other).norm() < 0.02 * other.norm()
    assert float((one != 0).float().mean()) == pytest.approx(float((other != 0).float().mean()), abs=1e-3)
    assert float((one != 0).float().mean()) > 0.99 and not warned(caplog)
    half.save_model(str(tmp_path / "final"))
    assert {p.dtype for p in load_file(tmp_path / "final" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("make", "options", "advice"),
    [
        (lambda folder: policy(), {}, "Load the model with `dtype=torch.float32`, or give `model` its folder"),
        (lambda folder: folder, {"model_init_kwargs": {"dtype": "bfloat16"}}, "Leave `dtype` out"),
        (lambda folder: folder, {"model_init_kwargs": {"torch_dtype": "bfloat16"}}, "Leave `dtype` out"),
        (lambda folder: folder, {"model_init_kwargs": {"dtype": "auto"}}, "Leave `dtype` out"),
        (
            lambda folder: get_peft_model(policy(), LoraConfig(**LORA), autocast_adapter_dtype=False),
            {},
            "autocast_adapter_dtype=True",
        ),
    ],
)
def test_weights_in_half_precision_that_are_asked_for_are_warned_of_once(tmp_path, caplog, make, options, advice):
    made = trainer(tmp_path, model=make(save(policy(), tmp_path / "policy")), **options)
    assert torch.bfloat16 in dtypes(made.model, trained=True)
    [said] = warned(caplog)
    assert said.startswith("100 % of the trained weights are held in bfloat16") and advice in said
    assert "1 % of the weights changed in bf16, and all in fp32" in said and "stable_adamw" in said


@pytest.mark.parametrize(
    ("options", "silent"),
    [
        ({"optim": "stable_adamw"}, True),
        ({"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}, True),
        ({"optim": "adamw_torch_8bit"}, False),
        ({"optim": "sgd"}, False),
    ],
)
def test_an_optimizer_that_keeps_small_steps_is_not_warned_of(tmp_path, caplog, options, silent):
    args = config(tmp_path)
    vars(args).update(options)  # as a configuration where its package is installed
    check_precision(policy(), args, optimizer=None, loaded_here=False)
    assert (not warned(caplog)) is silent


def test_weights_in_fp16_with_scaled_gradients_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`fp16=True` scales gradients.*dtype=torch.float32"):
        trainer(tmp_path, model=policy(torch.float16), fp16=True)


# adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("beside", TRAINED_BESIDE_LORA, ids=str)
def test_an_adapter_is_trained_in_fp32_over_a_base_as_saved(tmp_path, caplog, beside, autocast):
    """Where nothing casts between the two, a base beside more than LoRA is in fp32 too."""
    folder = save(policy(), tmp_path / "policy")
    made = trainer(
        tmp_path,
        model=folder,
        bf16=autocast,
        learning_rate=1e-3,
        max_steps=2,
        kwargs={"peft_config": LoraConfig(**LORA, **beside)},
    )
    assert dtypes(made.model, trained=True) == {torch.float32} and not warned(caplog)
    mixes = autocast or not {"modules_to_save", "bias"} & beside.keys()
    assert dtypes(made.model, trained=False) == {torch.bfloat16 if mixes else torch.float32}
    before = weights(made.model)
    made.train()
    assert train_logs(made)[0]["objective/kl"] == 0 and train_logs(made)[0]["rewards/margins"] == 0
    after = weights(made.model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    frozen = {name for name, p in made.model.named_parameters() if not p.requires_grad}
    assert changed and not changed & frozen
    parts = ("lora_", "modules_to_save", "trainable_tokens", "bias")
    for part in parts:
        trained = {name for name in after if part in name and name not in frozen}
        assert not trained or trained & changed, part


def test_an_adapters_folder_and_object_are_trained_in_fp32(tmp_path, caplog):
    base = save(policy(), tmp_path / "policy")
    saved = get_peft_model(policy(), LoraConfig(**LORA, modules_to_save=["lm_head"]))
    saved.peft_config["default"].base_model_name_or_path = base
    folder = save(saved, tmp_path / "adapter")
    made = trainer(tmp_path, model=folder, bf16=True)
    assert isinstance(made.model, PeftModel)
    assert dtypes(made.model, trained=True) == {torch.float32}
    assert dtypes(made.model, trained=False) == {torch.bfloat16}
    made = trainer(tmp_path, model=get_peft_model(policy(), LoraConfig(**LORA)))
    assert dtypes(made.model, trained=True) == {torch.float32} and not warned(caplog)


# the reference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_reference_equals_the_policy_at_the_start_bit_for_bit(tmp_path, bf16, given):
    folder = save(policy(), tmp_path / "policy")
    kwargs = {"ref_model": folder} if given else {}
    made = trainer(tmp_path, model=folder, bf16=bf16, learning_rate=1e-2, max_steps=2, kwargs=kwargs)
    with made.reference.active() as reference:
        linear = {m.weight.dtype for m in reference.modules() if isinstance(m, nn.Linear)}
        assert linear == {torch.bfloat16 if bf16 else torch.float32}
        others = [m for m in reference.modules() if not isinstance(m, nn.Linear)]
        assert {p.dtype for m in others for p in m.parameters(recurse=False)} == {torch.float32}
    assert dtypes(made.model, trained=True) == {torch.float32}
    made.train()
    first, last = train_logs(made)
    assert first["objective/kl"] == 0 and first["rewards/margins"] == 0 and last["objective/kl"] != 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_linear_layers_held_in_the_type_they_compute_in_change_no_bit(tmp_path, family):
    model = tiny.causal_lm(family).requires_grad_(False)
    held = copy.deepcopy(model)
    hold_linears(held, config(tmp_path, bf16=True))
    sizes = [sum(p.nbytes for p in m.parameters()) for m in (held, model)]
    assert sizes[0] < (1 if family == "gpt2" else 0.75) * sizes[1] or family == "gpt2"  # whose layers are no nn.Linear
    assert held.get_input_embeddings().weight.dtype == torch.float32  # also where it is the head
    ids = torch.arange(4, 24)[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(held(ids).logits, model(ids).logits)


def test_a_reference_in_another_type_is_warned_of(tmp_path, caplog):
    trainer(tmp_path, model=policy().float(), kwargs={"ref_model": policy()})
    assert "`ref_model` is in bfloat16 and the policy in float32" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, model=policy().float(), kwargs={"ref_model": policy().float()})
    assert "`ref_model` is in" not in caplog.text


def test_frozen_models_stay_as_they_were_saved(tmp_path):
    """Also where the policy is in fp32: reward models, gold and those of judges."""
    torch.manual_seed(0)
    from transformers import LlamaForSequenceClassification

    reward = LlamaForSequenceClassification(tiny.config("llama", num_labels=1, hidden_size=16)).to(torch.bfloat16)
    folder, policy_folder = save(reward, tmp_path / "reward"), save(policy(), tmp_path / "policy")
    made = trainer(tmp_path, model=policy_folder, reward_funcs=folder, kwargs={"eval_reward_funcs": folder})
    assert made.gold is not None
    for scorer in (*made.scorers, *made.gold.scorers):
        assert {p.dtype for p in scorer.model.parameters()} == {torch.bfloat16}
    made.train()
