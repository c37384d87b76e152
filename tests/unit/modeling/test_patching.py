"""Forwards in the place of a module's own: gone again afterwards, whoever else was there at the same time."""

import pytest
import torch
from torch import nn

from online_dpo.modeling.patching import replaced_forwards


def test_what_was_there_before_is_there_again():
    layer, other, ones = nn.Linear(2, 2), nn.Identity(), torch.ones(1, 2)
    own = layer(ones)
    with replaced_forwards({layer: lambda x: x + 1, other: lambda x: x + 2}):
        assert layer(ones).tolist() == [[2.0, 2.0]] and other(ones).tolist() == [[3.0, 3.0]]
        with pytest.raises(KeyError), replaced_forwards({layer: lambda x: x * 5}):
            assert layer(ones).tolist() == [[5.0, 5.0]]
            raise KeyError
        assert layer(ones).tolist() == [[2.0, 2.0]]
    assert torch.equal(layer(ones), own) and "forward" not in {**vars(layer), **vars(other)}


@pytest.mark.parametrize("first", [0, 1])
def test_nothing_stays_behind_where_two_threads_cross(first):
    """Entered one after the other and left in both orders, as threads may."""
    layer = nn.Identity()
    both = [replaced_forwards({layer: lambda x, n=n: x + n}) for n in range(2)]
    for one in both:
        one.__enter__()
    both[first].__exit__(None, None, None)
    both[1 - first].__exit__(None, None, None)
    assert "forward" not in vars(layer)
