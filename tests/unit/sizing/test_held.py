"""The bytes that the formula says are held, against the tensors of real trainers."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, TrainerCallback

from online_dpo.sizing.held import gradient_term, held_terms, trained_weights
from online_dpo.sizing.plan import Plan
from online_dpo.sizing.shape import MODELS, as_reward_model, shape_of
from online_dpo.training.build import build_policy
from support import tiny
from support.training import config, trainer

ALL_LINEAR = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def stored(tensors):
    """Bytes of the tensors' memory, shared memory once."""
    parts = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.dim()}
    return sum(parts.values())


class Count(TrainerCallback):
    """Counts at the second optimizer step: what Adam holds is there since the first."""

    def __init__(self):
        self.bytes = {}

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == 0:
            return
        parameters = list(model.parameters())
        reference = self.of.reference.model
        self.bytes = {
            "weights": stored(parameters),
            "gradients": stored([p.grad for p in parameters if p.grad is not None]),
            "optimizer": stored([value for kept in optimizer.state.values() for value in kept.values()]),
            **({} if reference is None else {"reference": stored(reference.parameters())}),
        }


def counted(tmp_path, model, peft_config=None, **fields):
    count = Count()
    made = trainer(
        tmp_path,
        model,
        kwargs={"callbacks": [count], "peft_config": peft_config},
        max_steps=2,
        optim="adamw_torch",
        **fields,
    )
    count.of = made
    made.train()
    return count.bytes


def predicted(plan):
    terms = {term.name: term.gpu for term in (*held_terms(plan), gradient_term(plan))}
    return {name: terms[name] for name in sorted(terms)}


MODEL_KINDS = {
    "llama, tied": lambda: tiny.causal_lm("llama"),
    "qwen2, untied": lambda: tiny.causal_lm("qwen2", tie_word_embeddings=False),
    "qwen3, tied": lambda: tiny.causal_lm("qwen3"),
    "mistral, untied": lambda: tiny.causal_lm("mistral", tie_word_embeddings=False),
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_all_weights_trained(tmp_path, kind, bf16):
    model = MODEL_KINDS[kind]()
    shape = shape_of(model.config.to_dict())
    assert shape.parameters == model.num_parameters()
    got = counted(tmp_path, model, bf16=bf16)
    assert dict(sorted(got.items())) == predicted(Plan(shape, bf16=bf16))


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_lora_on_a_base_in_bf16(tmp_path, kind):
    model = MODEL_KINDS[kind]().to(torch.bfloat16)
    got = counted(tmp_path, model, ALL_LINEAR, bf16=True)
    plan = Plan(shape_of(model.config.to_dict()), adapter="lora", lora_rank=4)
    assert dict(sorted(got.items())) == predicted(plan)


def four_bit_tensors(model):
    """The memory of weights in 4 bits: their codes, scales, and the values of codes."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (parameter.data, state.absmax, state.code)
            if state.nested:
                yield from (state.state2.absmax, state.state2.code, state.offset[None])


@pytest.mark.parametrize("double", [False, True])
def test_qlora(tmp_path, double):
    pytest.importorskip("bitsandbytes")
    model = tiny.causal_lm("llama", tie_word_embeddings=False, hidden_size=64, intermediate_size=160)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    options["bnb_4bit_compute_dtype"] = torch.bfloat16
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
    )
    # before the first pass, in which bitsandbytes repacks weights for a CPU
    policy = build_policy(quantised, ALL_LINEAR, config(tmp_path, bf16=True))
    others = [p for p in policy.parameters() if not hasattr(p, "quant_state")]
    plan = Plan(shape_of(model.config.to_dict()), adapter="qlora", lora_rank=4, double_quantization=double)
    assert stored(four_bit_tensors(policy)) + stored(others) == predicted(plan)["weights"]


def test_weights_in_4_bits_are_whole_unless_fsdp2_finds_floats():
    """Embedding, head and norms are shared in any case; codes take half a byte a number, scales are not shared."""

    def weights(**options):
        return predicted(Plan(SEVEN, adapter="qlora", gpus=8, **options))["weights"]

    matrices = sum(w.numbers * w.count for w in SEVEN.of_a_layer() if w.columns > 1)
    others = SEVEN.parameters - matrices
    adapter = sum(w.numbers * w.count for w in trained_weights(Plan(SEVEN, adapter="qlora")))
    whole, as_floats = weights(sharding="fsdp2"), weights(sharding="fsdp2", packed_as_floats=True)
    assert weights() - whole == pytest.approx(4 * (others + adapter) * 7 / 8, rel=1e-4)
    assert whole - as_floats == pytest.approx(matrices / 2 * 7 / 8, rel=1e-4)
    assert weights(sharding="zero3", packed_as_floats=True) == weights(sharding="zero3")


QWEN = {"0.5B": 494_032_768, "1.5B": 1_543_714_304, "7B": 7_615_616_512, "32B": 32_763_876_352}


@pytest.mark.parametrize("name", QWEN)
def test_parameters_of_the_sizes_in_the_table(name):
    assert MODELS[name].parameters == QWEN[name]


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match="this model is a 'gpt2'"):
        shape_of(tiny.config("gpt2").to_dict())


def test_reward_model_of_a_shape():
    model = AutoModelForSequenceClassification.from_config(tiny.config("qwen2", num_labels=1))
    shape = as_reward_model(shape_of(tiny.config("qwen2").to_dict()))
    assert shape.parameters == model.num_parameters()
    parted = Plan(shape, "fsdp2", gpus=2, reward_model=shape, reward_model_sharded=True)
    whole = Plan(shape, "fsdp2", gpus=2, reward_model=shape)
    assert predicted(whole)["reward model"] == 2 * model.num_parameters()
    assert predicted(parted)["reward model"] == 2 * sum(-(-p.shape[0] // 2) * p[0].numel() for p in model.parameters())


SEVEN = MODELS["7B"]
P = SEVEN.parameters


def close(terms, **expected):
    """Bytes for each parameter; rounding to equal parts is below a millionth."""
    assert {name: size / P for name, size in terms.items() if size} == pytest.approx(expected, rel=1e-6)


HELD_LINEARS = (2 * (P - 2 * 28 * SEVEN.hidden - SEVEN.hidden - 152064 * 3584) + 4 * (152064 * 3584 + 57 * 3584)) / P


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        ("none", dict(weights=4, optimizer=8, gradients=8, reference=HELD_LINEARS)),  # DDP holds gradients twice
        ("zero1", dict(weights=2, optimizer=12 / 8, gradients=2, reference=2)),
        ("zero2", dict(weights=2, optimizer=12 / 8, gradients=2 / 8, reference=2)),
        ("zero3", dict(weights=2 / 8, optimizer=12 / 8, gradients=2 / 8, reference=2 / 8)),
        ("fsdp2", dict(weights=4 / 8, optimizer=8 / 8, gradients=4 / 8, reference=HELD_LINEARS / 8)),
    ],
)
def test_bytes_for_each_parameter_on_eight_gpus(sharding, expected):
    """ZeRO's are those of table 1 of the paper: 2 + 2 + 12 bytes, of which a stage divides one, two or three."""
    close(predicted(Plan(SEVEN, sharding, gpus=8)), **expected)


def test_offloaded_parts_are_counted_on_the_machine():
    def sides(**options):
        terms = [*held_terms(plan := Plan(SEVEN, gpus=8, **options)), gradient_term(plan)]
        return {t.name: (round(t.gpu / P, 4), round(t.host / P, 4)) for t in terms if t.name != "reference"}

    assert sides(sharding="zero2", offload_optimizer=True) == {
        "weights": (2, 0), "optimizer": (0, 1.5), "gradients": (0, 0.5)
    }  # fmt: skip
    assert sides(sharding="zero3", offload_optimizer=True, offload_parameters=True) == {
        "weights": (0, 0.25), "optimizer": (0, 1.5), "gradients": (0, 0.5)
    }  # fmt: skip
    assert sides(sharding="fsdp2", offload_parameters=True) == {
        "weights": (0, 0.5), "optimizer": (0, 1), "gradients": (0, 0.5)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(gpus=0), "at least one GPU"),
        (dict(sharding="fsdp2", offload_optimizer=True), "under ZeRO only"),
        (dict(sharding="zero2", offload_parameters=True), "ZeRO-3 and FSDP2 only"),
    ],
)
def test_what_does_not_go_together_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Plan(SEVEN, **options)
