"""Closing the loop (`--feedback global`): a survivor's Stage 2 validation runs during Stage 1, and Optuna is told its
Global TPE instead of its Local TPE.

Nothing here is remembered beyond the journal: who waits, what has been validated with which weights, and what Optuna
has been told are all read from it, so a resumed run goes on where it was.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from nkat_ray.search.journal import RunState, TrialRecord
from nkat_ray.search.searcher import FAILED_REASONS


class Stage2(Protocol):
    """What Stage 2 offers to Stage 1. `search` does not know who it is."""

    def submit(self, record: TrialRecord) -> None:
        """Send out what is missing of a survivor's validation, with the best weights that it has now."""

    def collect(self, *, wait: bool) -> None:
        """Write what has been finished into the journal; `wait` until something has."""

    def score(self, record: TrialRecord) -> float | None:
        """Global TPE on validation with the trial's best weights; None unless all of it is in the journal, NaN where
        nothing counts."""

    @property
    def tasks(self) -> int:
        """Tasks that were sent out and have not been collected."""

    @property
    def busy(self) -> Collection[int]:
        """Trials with such tasks."""


class Feedback:
    """Decides when a survivor's validation starts, and tells Optuna when it is over.

    A survivor that has ended comes first, before any new trial: its weights are final and its slot is free. One that
    still trains starts as soon as it passes only on a slot that no new trial would take; if it gets better afterwards,
    it is validated again once it has ended.

    Args:
        stage2: does the work.
        state: the journal's.
        gate: Local TPE to reach.
        slots: trials and tasks at a time, as it is now.
        exhausted: whether no new trial will be proposed any more.
        tell: tells Optuna of a trial; idempotent.
    """

    def __init__(
        self,
        stage2: Stage2,
        *,
        state: RunState,
        gate: float,
        slots: Callable[[], int],
        exhausted: Callable[[], bool],
        tell: Callable[[TrialRecord], None],
    ) -> None:
        self._stage2, self._gate, self._slots, self._exhausted, self._tell = stage2, gate, slots, exhausted, tell
        passed = (state.trials[trial] for trial in state.survivors(gate))
        self._untold = {r.trial: r for r in passed if r.stop_reason not in FAILED_REASONS}
        self._state = state
        self._live: set[int] = set()

    def on_trial_start(self, trial: int, params: Mapping[str, Any]) -> None:
        """A trial has its slot."""
        self._live.add(trial)

    def on_survivor(self, trial: int) -> None:
        """A trial has passed the gate."""
        self._untold[trial] = self._state.trials[trial]

    def on_end(self, record: TrialRecord) -> None:
        """A trial has ended; a survivor is told later, when its Global TPE is known."""
        self._live.discard(record.trial)
        if record.trial not in self._untold or record.stop_reason in FAILED_REASONS:
            self._untold.pop(record.trial, None)
            self._tell(record)

    def holds(self) -> bool:
        """Whether a new trial would take a slot that a validation needs."""
        self.advance()
        waits = any(record.ended and record.trial not in self._stage2.busy for record in self._untold.values())
        return waits or len(self._live) + self._stage2.tasks >= self._slots()

    def advance(self, *, wait: bool = False) -> None:
        """Collect what is finished, tell what is known, send out what has a slot."""
        self._stage2.collect(wait=wait and self._stage2.tasks > 0)
        for record in sorted(self._untold.values(), key=lambda record: not record.ended):
            if record.trial in self._stage2.busy:
                continue
            known = self._stage2.score(record) is not None
            if known and record.ended:
                self._tell(record)
                del self._untold[record.trial]
            elif not known and self._has_slot() and (record.ended or self._exhausted()):
                self._stage2.submit(record)

    def finish(self) -> None:
        """Wait until Optuna has been told of every survivor; no trial runs any more."""
        self._live.clear()
        while self._untold:
            self.advance(wait=True)

    def _has_slot(self) -> bool:
        return len(self._live) + self._stage2.tasks < self._slots()
