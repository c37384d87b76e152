"""All ranks leave a forward and backward pass together, where memory runs out on one of them.

A rank that raises an error in the middle of a pass leaves the others waiting in the next collective operation. So every
rank asks all others right before each of them whether they are still there, and once more at the end of the pass. A
rank whose memory ran out answers at once that it is not; the others learn of it where they ask next, and leave the pass
as well. Nobody has begun an operation which the others do not make, wherever in the pass memory ran out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from online_dpo.distributed.collectives import HostGroup, any_rank, world_size
from online_dpo.errors import OnlineDPOError, error_text, is_out_of_memory

HOST = torch.device("cpu")


class PassAbandoned(OnlineDPOError):
    """Memory ran out on another rank: this one leaves its pass too."""


class AgreedAttempt:
    """How a pass ended: ``fits`` on all ranks, or not; whether it was this rank whose memory ran out, and the error's
    message.
    """

    fits = False
    failed_here = False
    reason = ""


class Agreement:
    """Tells all ranks at the same place of a pass that memory has run out on one of them.

    Making one is a collective operation. ``group`` are the ranks, talking through memory of the host: whether that of
    the device is full does not matter.

    Args:
        timeout: how long another rank is waited for.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.group = HostGroup(timeout)
        self._inside = self._abandoned = False

    def check(self) -> None:
        """Asks the other ranks whether they are still in the pass; called before each collective operation of a model.
        Outside of a pass it does nothing.

        Raises:
            PassAbandoned: one of them is not.
        """
        if self._inside and not self._abandoned and any_rank(False, HOST, self.group):
            self._abandoned = True
        if self._abandoned:
            raise PassAbandoned("Memory ran out on another process of this run.")

    @contextmanager
    def one_pass(self) -> Iterator[AgreedAttempt]:
        """Inside is a forward and backward pass, equally long on all ranks. Running out of memory is no error there: it
        ends the pass on all ranks. Afterwards the attempt says whether that happened.

        >>> with agreement.one_pass() as attempt:
        ...     loss = one_pass(rows)
        >>> if not attempt.fits: ...  # here, and not in an `except`, whose traceback would keep tensors alive
        """
        attempt = AgreedAttempt()
        self._inside, self._abandoned = world_size() > 1, False
        try:
            yield attempt
            self.check()
            attempt.fits = True
        except Exception as error:
            # known by the flag: on its way through a backward pass, the error may have become another one
            if not self._abandoned:
                if not is_out_of_memory(error):
                    raise
                attempt.failed_here, attempt.reason = True, error_text(error, first_line=True)
                if self._inside:
                    any_rank(True, HOST, self.group)
        finally:
            self._inside = self._abandoned = False
