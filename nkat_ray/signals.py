"""End a run in order on Ctrl-C, SIGTERM, SIGHUP, and on Windows Ctrl-Break or a closed window."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final, Self

from nkat_ray.errors import INTERRUPTED

SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)  # SIGHUP is POSIX's, SIGBREAK is Windows'
AT_ONCE: Final = b"\x1b[?25h\nended at once: a second interrupt; the run can be continued with --resume\n"


class Interrupted(Exception):
    """A run was asked to end; all finished work is in its journal."""


class Interruption:
    """The signals that end a run, from `with` until its end.

    The first one raises KeyboardInterrupt where the program is, or inside `deferred()` only sets `requested`: an
    exception raised just anywhere could hit Optuna while it holds the lock of its file. A second one ends the process
    at once, or in an interactive session (a notebook, a Python prompt) raises KeyboardInterrupt; no finished work is
    lost, since each event is in the journal before any code acts on it. A signal that was ignored when the process
    began (`nohup`) stays ignored. Outside the main thread, where Python allows no handlers, all stay as they are.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def install(self) -> None:
        """Install the handlers; call it again after `ray.init`, which installs its own for SIGTERM."""
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            current = signal.getsignal(number)
            if current != signal.SIG_IGN and current != self._handle:
                self._before.setdefault(number, current)
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a first signal only set `requested` within the block; the code inside calls `check` where it is safe."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived.

        Raises:
            Interrupted: a signal has arrived.
        """
        if self.requested:
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again and not hasattr(sys, "ps1"):  # an interactive session has it, and values that a user would lose
            with contextlib.suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), AT_ONCE)
            os._exit(INTERRUPTED)
        if again or not self._deferred:
            raise KeyboardInterrupt
