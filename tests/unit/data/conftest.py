"""The same rows as a dataset or a stream."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

from support.prompt_rows import yield_rows


@pytest.fixture(params=["map", "streaming", "streaming without features"])
def shape(request):
    """The same rows as a map-style dataset or a stream."""

    def as_shape(rows):
        if request.param == "map":
            return Dataset.from_list(rows)
        if request.param == "streaming":
            return Dataset.from_list(rows).to_iterable_dataset()
        return IterableDataset.from_generator(yield_rows, gen_kwargs={"rows": tuple(rows)})

    return as_shape
