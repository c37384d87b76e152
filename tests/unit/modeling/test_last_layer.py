"""The last layer computes what is read, and what is read is what it would have been anyway."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM

from online_dpo.modeling import last_layer
from online_dpo.modeling.attention import segments
from online_dpo.modeling.attention.choice import use_segments
from online_dpo.modeling.attention.segments import Segment, trim_to_read
from online_dpo.modeling.introspection import unwrapped
from online_dpo.modeling.last_layer import enable_selective_last_layer, last_layer_kwargs
from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from online_dpo.modeling.onednn import onednn_linears
from online_dpo.packing.pack import pack_groups
from online_dpo.packing.prefix_tree import Tree
from online_dpo.rollout.builtin.decoding import Decoder
from online_dpo.scoring.rewards.shared_prefix import score_trees
from support import tiny

LENGTHS = (40, 25)
COMPLETIONS = [[[5, 6, 7, 1], [8, 9]], [[10, 11, 12], [15]]]
READ, ALL = (
    8,
    128,
)  # in one row with padding; read are the last one of each prompt, and of each completion all but the last


def rows(shared=True):
    made = [tiny.group(p, c) for p, c in zip(tiny.prompts(LENGTHS), COMPLETIONS, strict=True)]
    return pack_groups(made, [], shared, capacity=75 if shared else 0)


@contextmanager
def everywhere():
    """As if everything were read."""
    kept, last_layer.MAX_READ_SHARE = last_layer.MAX_READ_SHARE, 0.0
    try:
        yield
    finally:
        last_layer.MAX_READ_SHARE = kept


def tokens_seen(module):
    """How many tokens each call of the module is left with, from now on."""
    seen, forward = [], module.forward

    def counting(hidden, *args, **kwargs):
        seen.append(hidden.shape[:-1].numel())
        return forward(hidden, *args, **kwargs)

    module.forward = counting
    return seen


def layers(model):
    return next(m for m in model.base_model.children() if isinstance(m, torch.nn.ModuleList))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_what_is_read_is_computed_and_it_is_the_same(family):
    model = tiny.causal_lm(family)
    enable_logprobs(model)
    last, before = tokens_seen(layers(model)[-1].mlp), tokens_seen(layers(model)[0].mlp)
    sparing = row_logprobs(model, rows()).token_logps_M
    assert last == [READ] and before == [ALL]
    with everywhere():
        whole = row_logprobs(model, rows()).token_logps_M
    assert last == [READ, ALL]
    torch.testing.assert_close(sparing, whole, atol=1e-6, rtol=1e-6)
    weight_M = torch.linspace(-1, 1, len(whole))
    parameters = list(model.parameters())
    ours = torch.autograd.grad((sparing * weight_M).sum(), parameters)
    theirs = torch.autograd.grad((whole * weight_M).sum(), parameters)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


def test_queries_and_outputs_are_spared_too():
    model = tiny.causal_lm()
    enable_logprobs(model)
    attention = layers(model)[-1].self_attn
    seen = {name: tokens_seen(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    row_logprobs(model, rows())
    assert seen == {"q_proj": [READ], "k_proj": [ALL], "v_proj": [ALL], "o_proj": [READ]}


ADAPTER = LoraConfig(target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False)


def alone(model):
    """Log-probabilities of all completions by a model that nothing has been changed in, one sequence at a time."""
    made = []
    for prompt, completions in zip(tiny.prompts(LENGTHS), COMPLETIONS, strict=True):
        for completion in completions:
            logits = model(input_ids=torch.tensor([[*prompt.token_ids, *completion]])).logits
            logps = logits.log_softmax(-1)[0, len(prompt.token_ids) - 1 : -1]
            made.append(logps.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(made)


def gradients(model, logps_M):
    (logps_M * torch.linspace(-1, 1, len(logps_M))).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_layer_that_is_computed_again_spares_the_same(family, use_reentrant, adapted, segmented, monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST", 1)
    model = tiny.causal_lm(family).train()
    if adapted:
        torch.manual_seed(0)
        model = get_peft_model(model, ADAPTER)
    untouched = copy.deepcopy(model)
    expected = gradients(untouched, alone(untouched))
    if segmented:
        use_segments(model)
    enable_logprobs(model)
    tiny.checkpoint_layers(model, use_reentrant)
    seen = tokens_seen(layers(unwrapped(model))[-1].mlp)
    got = gradients(model, row_logprobs(model, rows()).token_logps_M)
    assert seen == [READ, READ]
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-4 * value.norm(), name
        assert value.norm() > 0


def test_with_every_second_layer_computed_again():
    """As of `every_n_layers`: the last one is among those that keep their activations."""
    model, untouched = tiny.causal_lm().train(), tiny.causal_lm().train()
    enable_logprobs(model)
    tiny.checkpoint_layers(model)
    layers(model)[-1].gradient_checkpointing = False
    seen = tokens_seen(layers(model)[-1].mlp)
    got = gradients(model, row_logprobs(model, rows()).token_logps_M)
    assert seen == [READ]
    for name, value in gradients(untouched, alone(untouched)).items():
        assert (got[name] - value).norm() <= 1e-4 * value.norm(), name


def test_a_layer_keeps_its_name_and_kind():
    """Wrappers of sharded models look for both."""
    model, plain = tiny.causal_lm(), tiny.causal_lm()
    enable_logprobs(model)
    last = layers(model)[-1]
    assert type(last) is not type(layers(plain)[-1]) and isinstance(last, type(layers(plain)[-1]))
    assert [type(layer).__name__ for layer in layers(model)] == ["LlamaDecoderLayer"] * 2
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(layers(copy.deepcopy(model))[-1]) is type(last)


@torch.no_grad()
def test_a_layer_whose_forward_is_somebody_elses_is_left_alone():
    model = tiny.causal_lm()
    expected = row_logprobs(model, rows(), chunked=False).token_logps_M
    add_hook_to_module(layers(model)[-1], AlignDevicesHook())
    enable_logprobs(model)
    seen = tokens_seen(layers(model)[-1].mlp)
    torch.testing.assert_close(row_logprobs(model, rows()).token_logps_M, expected, atol=1e-5, rtol=1e-5)
    assert seen == [ALL] and not last_layer_kwargs(model, torch.arange(2))


@torch.no_grad()
def test_experts_are_left_alone_and_the_rest_is_spared():
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=tiny.VOCABULARY, num_key_value_heads=2, num_local_experts=4, **shape)
    ).eval()
    enable_logprobs(model)
    seen = tokens_seen(layers(model)[-1].self_attn.o_proj)
    sparing = row_logprobs(model, rows()).token_logps_M
    assert seen == [READ]
    with everywhere():
        torch.testing.assert_close(sparing, row_logprobs(model, rows()).token_logps_M, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_with_adapters_and_with_other_products():
    model = get_peft_model(tiny.causal_lm(), ADAPTER).eval()
    enable_logprobs(model)
    attention = layers(model.get_base_model())[-1].self_attn
    with everywhere():
        whole = row_logprobs(model, rows()).token_logps_M
        with model.disable_adapter():
            base = row_logprobs(model, rows()).token_logps_M
    with onednn_linears(model, pack=True):
        layer = layers(model.get_base_model())[-1]
        replaced = [module for module in layer.modules() if "forward" in vars(module)]
        torch.testing.assert_close(row_logprobs(model, rows()).token_logps_M, whole, atol=1e-5, rtol=1e-5)
        assert [module for module in layer.modules() if "forward" in vars(module)] == replaced
    with model.disable_adapter():
        torch.testing.assert_close(row_logprobs(model, rows()).token_logps_M, base, atol=1e-6, rtol=1e-6)
    assert (whole - base).abs().max() > 0.01
    assert "forward" not in vars(attention.q_proj) and "forward" not in vars(attention.o_proj)


@torch.no_grad()
def test_adapters_may_come_later():
    model = tiny.causal_lm()
    enable_logprobs(model)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)).eval()
    last = layers(model.get_base_model())[-1]
    seen = [tokens_seen(module) for module in (last.self_attn.q_proj, last.self_attn.q_proj.lora_A["default"])]
    sparing = row_logprobs(model, rows()).token_logps_M
    assert seen == [[READ], [READ]]
    with everywhere():
        torch.testing.assert_close(row_logprobs(model, rows()).token_logps_M, sparing, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_copy_spares_itself_and_not_its_original():
    model = tiny.causal_lm()
    enable_logprobs(model)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter *= 1.1
    seen = [tokens_seen(layers(one)[-1].mlp) for one in (model, copied)]
    sparing = row_logprobs(copied, rows()).token_logps_M
    assert seen == [[], [READ]]
    with everywhere():
        torch.testing.assert_close(row_logprobs(copied, rows()).token_logps_M, sparing, atol=1e-6, rtol=1e-6)
    assert (row_logprobs(model, rows()).token_logps_M - sparing).abs().max() > 1e-3
    assert seen == [[READ], [READ, ALL]]


@torch.no_grad()
def test_threads_do_not_meet_in_the_last_layer():
    model = tiny.causal_lm()
    enable_logprobs(model)
    both = [rows(shared=True), rows(shared=False)]
    expected = [row_logprobs(model, made).token_logps_M for made in both]
    with ThreadPoolExecutor(2) as pool:
        for i, found in enumerate(pool.map(lambda i: row_logprobs(model, both[i % 2]).token_logps_M, range(60))):
            assert torch.equal(found, expected[i % 2])


@torch.no_grad()
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_reward_models_are_read_at_the_last_token(family, segmented, monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST", 1)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny.config(family, num_labels=1)).eval()
    if segmented:
        use_segments(model)
    enable_selective_last_layer(model)
    trees = [Tree(tuple(range(5, 25)), ((7, 8), (9,))), Tree(tuple(range(8, 20)), ((30,), (31, 9, 8)))]
    seen = tokens_seen(layers(model)[-1].mlp)
    sparing = score_trees(model, trees)
    assert seen == [4]
    with everywhere():
        whole = score_trees(model, trees)
    assert sparing.keys() == whole.keys() and len(set(whole.values())) == 4
    assert sparing == pytest.approx(whole, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prompts_are_read_at_their_end(family):
    model = tiny.causal_lm(family)
    enable_logprobs(model)
    prompts = [prompt.token_ids for prompt in tiny.prompts((9, 14, 14))]
    seen = tokens_seen(layers(model)[-1].mlp)
    found = Decoder(model, prompts, 2, 4).prefill()
    assert seen == [3]
    for logits_V, ids in zip(found, prompts, strict=True):
        torch.testing.assert_close(logits_V, model(torch.tensor([ids])).logits[0, -1], atol=1e-5, rtol=1e-5)


def test_where_nearly_all_is_read_nothing_is_spared():
    model = tiny.causal_lm()
    enable_logprobs(model)
    seen = tokens_seen(layers(model)[-1].mlp)
    ids = torch.arange(4, 24)[None]
    plain = model.base_model(ids)[0]
    assert torch.equal(model.base_model(ids, **last_layer_kwargs(model, torch.arange(19)))[0], plain)
    assert seen == [20, 20]
    assert not last_layer_kwargs(torch.nn.Linear(2, 2), torch.arange(2))


def test_segments_as_far_as_they_are_read():
    first = [Segment(0, 0, 0, 6, 0), Segment(0, 6, 6, 9, 6), Segment(0, 6, 9, 12, 9)]
    second = [Segment(0, 0, 0, 4, 0), Segment(0, 4, 4, 8, 4)]
    read_X = torch.tensor([5, 6, 7, 12 + 3, 12 + 6])
    assert trim_to_read([first, second], read_X, length=12) == [
        [(0, 0, 0, 6, 5), (0, 6, 6, 8, 6)],
        [(0, 0, 0, 4, 3), (0, 4, 4, 7, 6)],
    ]
