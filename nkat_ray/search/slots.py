"""How many trials run at a time, while nodes join and leave."""

import time
from collections.abc import Callable

LOOK_S = 2.0  # between two looks at the cluster: Tune asks ten times a second


class Slots:
    """The number of slots at the moment of the call.

    Args:
        number: at the start.
        look: counts anew.
        on_change: told the new number.
        clock: seconds.
    """

    def __init__(
        self,
        number: int,
        *,
        look: Callable[[], int],
        on_change: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._number, self._look, self._on_change, self._clock = number, look, on_change, clock
        self._looked_s = clock()

    def __call__(self) -> int:
        """Slots now, at most `LOOK_S` seconds ago."""
        if self._clock() - self._looked_s >= LOOK_S:
            self._looked_s, before = self._clock(), self._number
            self._number = self._look()
            if self._number != before:
                self._on_change(self._number)
        return self._number
