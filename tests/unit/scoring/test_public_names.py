"""The public names of `online_dpo.scoring`: each is found in the module that defines it."""

from __future__ import annotations

import pytest

import online_dpo.scoring


@pytest.mark.parametrize("name", online_dpo.scoring.__all__)
def test_each_public_name_is_imported_from_the_module_that_defines_it(name):
    value = getattr(online_dpo.scoring, name)
    if name != "RewardFunc":  # a type alias knows neither its name nor its module
        assert value.__name__ == name
        assert value.__module__ == online_dpo.scoring._HOMES[name]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Scorer'"):
        online_dpo.scoring.Scorer  # noqa: B018
