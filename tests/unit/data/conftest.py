"""What tests of data share: a cache of their own, and the same rows as a dataset or a stream."""

from __future__ import annotations

import datasets
import pytest
from datasets import Dataset, IterableDataset

from support.prompt_rows import yield_rows


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=[False, True], ids=["map", "streaming"])
def streaming(request):
    """Whether files are read as they are needed."""
    return request.param


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
