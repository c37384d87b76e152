"""Operations and tokens of a step, against values by hand and against torch's own count."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
)

from online_dpo.packing.pack import pack_pairs, stand_in
from online_dpo.training.metric_store import MetricStore
from online_dpo.training.metrics.work import ModelCost, Tokens, Work, cost_of
from online_dpo.types import Feedback, Pair, Round, Scores
from support import tiny

SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, vocab_size=100)


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, attn_implementation="eager", **SIZES, **options))


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_tokens_of_a_group_by_hand():
    # 3 tokens see 1 + 2 + 3; a completion of 2 sees 4 + 5, one of 1 sees 4
    assert Tokens.of_group(3, [2, 1]) == Tokens(read=6, predicted=3, seen=6 + 9 + 4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_estimate_is_torchs_count_of_a_forward_and_backward_pass(tied):
    """Eager attention multiplies the upper half as well: there every token sees all; norms have weights, no product."""
    model, length = llama(tie_word_embeddings=tied), 40
    cost = cost_of(model)
    ids = torch.arange(length)[None]
    whole = Tokens(read=length, predicted=length, seen=length * length)
    assert counted(lambda: model(ids)) == pytest.approx(cost.forward(whole), rel=0.01)
    assert counted(lambda: model(ids).logits.sum().backward()) == pytest.approx(cost.training(whole), rel=0.04)


def test_with_an_adapter_only_its_weights_have_gradients():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    cost, base = cost_of(model), cost_of(llama())
    assert cost.trained_body == 2 * 2 * (32 * 4 + 4 * 32) and cost.trained_head == 0
    assert cost.body == base.body + cost.trained_body and cost.head == base.head
    ids, whole = torch.arange(40)[None], Tokens(40, 40, 1600)
    assert counted(lambda: model(ids).logits.sum().backward()) == pytest.approx(
        cost.training(whole), rel=0.1
    )  # nothing flows into the embedding


def test_layers_may_differ_and_embeddings_of_layers_are_no_products():
    """The fourth layer of this Gemma has wider heads, and each has embeddings of its own of every token."""
    config = Gemma4TextConfig(
        num_hidden_layers=4,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        head_dim=8,
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=5000,
        num_kv_shared_layers=0,
        attn_implementation="eager",
        **SIZES,
    )
    model, length = Gemma4ForCausalLM(config), 40
    cost = cost_of(model)
    assert cost.attention == 4 * (3 * 8 + 16)
    ids = torch.arange(length)[None]
    forward = cost.forward(Tokens(read=length, predicted=length, seen=length * length))
    assert counted(lambda: model(ids)) == pytest.approx(forward, rel=0.02)


def test_a_model_whose_config_has_other_names_is_not_estimated():
    model = llama()
    model.config = PreTrainedConfig(num_transformer_layers=2, model_dim=32)
    assert cost_of(model) is None


def test_models_with_experts_are_not_estimated():
    config = MixtralConfig(num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1, **SIZES)
    assert cost_of(MixtralForCausalLM(config)) is None


@pytest.mark.parametrize(("shared", "read", "seen"), [(True, 3 + 3 + 2, 6 + 15 + 9), (False, 6 + 5, 21 + 15)])
def test_a_pass_counts_its_pairs_and_no_stand_in(shared, read, seen):
    group = tiny.group(tiny.prompts([3])[0], [[5, 6, 1], [7, 1], [8, 9, 10, 11]])
    store = MetricStore()
    work = Work(store, ModelCost(body=10, head=100, trained_body=10, trained_head=100, attention=1))
    work.trained(pack_pairs([Pair(group, 0, 1, 1.0, 0.0)], shared), has_reference=True)
    work.trained(stand_in(shared), has_reference=True)
    forward = 2 * 10 * read + 2 * 100 * 5 + 4 * seen
    assert store.drain() == {"trained_tokens": read, "flops": 3 * forward + forward}


def test_what_is_sampled_counts_once_and_only_here():
    first = tiny.group(tiny.prompts([2])[0], [[5, 6, 1], [7, 1]])
    again = Round([0], [first], Scores([[0.0, 0.0]], {}))
    feedback = Feedback([first], Scores([[0.0, 0.0]], {}), {}, further=(again,))
    store = MetricStore()
    work = Work(store, ModelCost(body=1, head=0, trained_body=1, trained_head=0, attention=0))
    work.sampled(feedback, here=True)
    assert store.drain() == {"completion_tokens": 10, "flops": 2 * 2 * (2 + 5)}
    work.sampled(feedback, here=False)
    assert store.drain() == {"completion_tokens": 10}
