"""Which weights a model has, where an optimizer evaluates others than it trains."""

import pytest
import torch

from online_dpo.training.evaluation_weights import EvaluationWeights


class TwoSets(torch.optim.SGD):
    """An optimizer whose evaluated weights are the trained ones plus 10."""

    shift = 10.0

    def eval(self):
        self._move(self.shift)

    def train(self):
        self._move(-self.shift)

    def _move(self, by: float):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data += by


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.zeros(1))


def test_inside_are_the_evaluated_weights_and_afterwards_those_that_are_trained(weight):
    weights = EvaluationWeights(lambda: TwoSets([weight], lr=1.0), is_training=lambda: True)
    with weights.in_model():
        with weights.in_model():
            assert weight.item() == 10 and weights.held
        assert weight.item() == 10
    assert weight.item() == 0 and not weights.held


def test_after_an_error_as_well(weight):
    weights = EvaluationWeights(lambda: TwoSets([weight], lr=1.0), is_training=lambda: True)
    with pytest.raises(ArithmeticError), weights.in_model():
        raise ArithmeticError
    assert weight.item() == 0 and not weights.held


def test_an_optimizer_with_one_set_is_left_alone(weight):
    weights = EvaluationWeights(lambda: torch.optim.SGD([weight], lr=1.0), is_training=lambda: True)
    with weights.in_model():
        assert weight.item() == 0 and not weights.held
