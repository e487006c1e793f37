"""Track the number of trials that run at the same time while nodes join and leave."""

import time
from collections.abc import Callable
from typing import Final

RECOUNT_S: Final = 2.0  # least time between two counts: Tune asks ten times per second


class Slots:
    """The current number of slots.

    Args:
        count: counts the slots of the cluster as it is now.
        on_change: called with each new number.
    """

    def __init__(
        self,
        number: int,
        *,
        count: Callable[[], int],
        on_change: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._number, self._count, self._on_change, self._clock = number, count, on_change, clock
        self._counted_s = clock()

    def __call__(self) -> int:
        """Return the number of slots, counted at most `RECOUNT_S` seconds ago."""
        if self._clock() - self._counted_s >= RECOUNT_S:
            self._counted_s, before = self._clock(), self._number
            self._number = self._count()
            if self._number != before:
                self._on_change(self._number)
        return self._number
