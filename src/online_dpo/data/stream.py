"""A stream for training that repeats, in an order that a resumed run reproduces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset


class EndlessStream(TorchIterableDataset):
    """Repeats a prepared stream for as long as training lasts.

    If a stream ended in the middle of an optimizer step, part of that step's gradient would be lost, and a resumed run,
    which skips the rows already read, would restart the stream at the wrong row. A shuffled stream gets a new order in
    each pass. Every process reads the whole stream and takes its own rows, so that all have the same number.
    """

    def __init__(self, stream: IterableDataset) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield rows, pass after pass."""
        passes = 0
        while True:
            self.stream.set_epoch(passes)
            empty = True
            for row in self.stream:
                empty = False
                yield row
            if empty:  # for example a worker that has no shard of the stream
                return
            passes += 1
