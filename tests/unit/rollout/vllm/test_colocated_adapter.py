"""The base model that vLLM has loaded by itself is the policy's."""

import pytest

from online_dpo.rollout.vllm.colocated_adapter import ColocatedAdapter
from online_dpo.rollout.vllm.worker import shape_of
from support import tiny


class Served:
    """The one answer that is needed of a `vllm.LLM`: the shape of its model."""

    def __init__(self, model):
        self._model = model

    def collective_rpc(self, name):
        assert name == "online_dpo_shape"
        return [shape_of(self._model.config)]


def test_a_base_model_of_another_shape_is_refused():
    policy, other = tiny.causal_lm(), tiny.causal_lm(hidden_size=64)
    here, there = policy.config.hidden_size, other.config.hidden_size
    with pytest.raises(ValueError, match=f"another base model than the policy's.* {there} there and {here} here"):
        ColocatedAdapter(Served(other), policy)
    assert ColocatedAdapter(Served(policy), policy).request is None
