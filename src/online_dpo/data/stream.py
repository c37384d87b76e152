"""A stream for training: read again and again, in an order that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset


class EndlessStream(TorchIterableDataset):
    """Repeats a prepared stream for as long as training lasts.

    A stream that ended in the middle of an optimizer step would leave a part of the step's gradient behind, and a
    resumed run, which skips what has been read, would begin it anew at the wrong row. Shuffled streams are shuffled
    anew each time. Every process reads all of it and takes its own rows, so that all have equally many.
    """

    def __init__(self, stream: IterableDataset) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        passes = 0
        while True:
            self.stream.set_epoch(passes)
            empty = True
            for row in self.stream:
                empty = False
                yield row
            if empty:  # such as a worker that has no part of the stream
                return
            passes += 1
