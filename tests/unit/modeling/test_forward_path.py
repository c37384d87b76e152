"""The check at the start: fast ways pass where they are right, and each way of being wrong is found."""

import copy

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from online_dpo.modeling.attention.choice import use_flex_attention
from online_dpo.modeling.attention.masks import why_not_shared
from online_dpo.modeling.borrowing import eval_mode
from online_dpo.modeling.forward_path import ForwardPath, choose_path
from online_dpo.modeling.logprobs import enable_logprobs
from support import tiny
from support.training import assert_same, gradient, trainer

COMPLETIONS = [[[5, 6, 7, 1], [8, 9]], [[10], [15, 1]], [[1], [20, 21, 22]]]
GROUPS = [tiny.group(p, c) for p, c in zip(tiny.prompts((9, 2, 14)), COMPLETIONS, strict=True)]


def choose(share=True, groups=GROUPS, **models):
    for model in models.values():
        enable_logprobs(model)
    return choose_path({name: lambda m=model: eval_mode(m) for name, model in models.items()}, groups, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_takes_the_fast_way(family, dtype):
    assert choose(policy=tiny.causal_lm(family).to(dtype)) == (ForwardPath(shared=True, chunked=True), [])


def test_nothing_is_settled_on_numbers_that_are_not_finite():
    model = tiny.causal_lm()
    model.model.norm.weight.data.fill_(float("nan"))
    assert choose(policy=model) is None


def test_nothing_is_settled_on_completions_of_one_token():
    groups = [tiny.group(prompt, [[4, 5], [6], [7]]) for prompt in tiny.prompts((9, 2))]
    assert choose(groups=groups, policy=tiny.causal_lm()) is None
    groups = [tiny.group(tiny.prompts((1,))[0], [[4], [6, 7]])]
    assert choose(groups=groups, policy=tiny.causal_lm()) == (ForwardPath(shared=True, chunked=True), [])


def test_the_check_makes_do_with_less_memory():
    for most, expected in ((3, (ForwardPath(shared=True, chunked=True), [])), (0, None)):
        model = tiny.causal_lm()

        def room(module, args, kwargs, most=most):
            if len(kwargs["input_ids"]) > most:
                raise torch.OutOfMemoryError("no room")

        model.model.register_forward_pre_hook(room, with_kwargs=True)
        assert choose(policy=model) == expected


def test_sharing_can_be_switched_off():
    assert choose(share=False, policy=tiny.causal_lm()) == (ForwardPath(shared=False, chunked=True), [])


def small(cls, config, **fields):
    torch.manual_seed(0)
    return cls(config(vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1, **fields)).eval()


def test_models_without_positions_get_padded_rows_and_a_reason():
    for model in (small(MambaForCausalLM, MambaConfig, state_size=4), small(BloomForCausalLM, BloomConfig, n_head=4)):
        path, [reason] = choose(policy=tiny.causal_lm(), reference=model)
        assert path == ForwardPath(shared=False, chunked=True)
        assert reason == "prompts are not shared, because of reference: it takes no `position_ids`"


@pytest.mark.parametrize("kind", ["flash_attention_2", "paged|sdpa"])
def test_attention_that_takes_no_mask_of_pairs_is_known_by_name(kind):
    model = tiny.causal_lm()
    model.config._attn_implementation_internal = kind
    assert kind in why_not_shared(model)


@pytest.fixture
def deaf_attention():
    """An attention that looks at everything before, whatever the mask says."""

    def attend(module, query, key, value, attention_mask, **kwargs):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs | {"is_causal": True})

    own = ALL_ATTENTION_FUNCTIONS._local_mapping.get("eager")
    ALL_ATTENTION_FUNCTIONS["eager"] = attend
    yield
    del ALL_ATTENTION_FUNCTIONS["eager"]
    if own is not None:
        ALL_ATTENTION_FUNCTIONS["eager"] = own


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_body_that_ignores_positions_is_found(family, dtype):
    model = tiny.causal_lm(family).to(dtype)

    def count_places(module, args, kwargs):
        kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]
        return args, kwargs

    model.model.register_forward_pre_hook(count_places, with_kwargs=True)
    path, [reason] = choose(policy=model)
    assert path == ForwardPath(shared=False, chunked=True), reason


@pytest.mark.parametrize("sharpness", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_ignores_the_mask_is_found(deaf_attention, dtype, sharpness):
    path, [reason] = choose(policy=tiny.causal_lm(attn_implementation="eager", sharpness=sharpness).to(dtype))
    assert path == ForwardPath(shared=False, chunked=True)
    assert reason.startswith("prompts are not shared, because of policy")


def test_a_model_that_cannot_read_block_masks_is_found():
    model = tiny.causal_lm("gpt2")
    use_flex_attention(model)
    path, [reason] = choose(policy=model)
    assert path == ForwardPath(shared=True, chunked=True) and "BlockMask" in reason
    assert reason.startswith("policy is read through SDPA, not FlexAttention: it fails with")


def test_a_body_that_fails_on_such_rows_is_found():
    model = tiny.causal_lm()

    def refuse(module, args, kwargs):
        if kwargs["attention_mask"].dim() == 4:
            raise NotImplementedError("only masks of two dimensions")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    path, [reason] = choose(policy=model)
    assert path == ForwardPath(shared=False, chunked=True)
    assert reason.endswith("it fails with NotImplementedError: only masks of two dimensions")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_changed_behind_the_models_back_are_found(dtype):
    model = tiny.causal_lm().to(dtype)

    def cool(module, args, output):
        if not isinstance(output, tuple):
            output.logits = output.logits / 2

    model.register_forward_hook(cool)
    path, [reason] = choose(policy=model)
    assert path == ForwardPath(shared=True, chunked=False)
    assert reason.startswith("logits of policy are not computed in chunks: log-probabilities differ by")


def test_training_on_the_slow_way_gives_the_same_gradient_and_says_why(tmp_path, caplog):
    model = tiny.causal_lm(sharpness=1.0)
    expected = gradient(tmp_path, model=copy.deepcopy(model))
    assert not [r for r in caplog.records if "Training takes a slower path" in r.message]

    def refuse(module, args, kwargs):
        if kwargs["attention_mask"].dim() == 4:
            raise NotImplementedError("only masks of two dimensions")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert_same(gradient(tmp_path, model=model, max_steps=1), expected, 1e-5)
    said = [r.getMessage() for r in caplog.records if "Training takes a slower path" in r.getMessage()]
    assert len(said) == 1 and "only masks of two dimensions" in said[0]


def test_recurrent_policies_train_in_padded_rows(tmp_path):
    model = small(MambaForCausalLM, MambaConfig, state_size=4, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
    made = trainer(tmp_path, model=model, max_steps=2)
    made.train()
    assert made.objective.choice.path == ForwardPath(shared=False, chunked=True)
    assert made.state.log_history[0]["grad_norm"] > 0
