"""The names that `online_dpo.scoring` offers."""

import pytest

import online_dpo.scoring


@pytest.mark.parametrize("name", online_dpo.scoring.__all__)
def test_every_public_name_is_there(name):
    assert getattr(online_dpo.scoring, name) is not None
