from functools import partial

import pytest

from support.checkpoint_folders import whole_checkpoint


@pytest.fixture
def make_checkpoint(tmp_path):
    return partial(whole_checkpoint, tmp_path)
