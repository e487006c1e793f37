"""Give Optuna the survivors' Global TPE instead of their Local TPE (`--feedback global`).

Survivors are validated on the datasets of Stage 2 while Stage 1 is still running (docs/spec.md section 6.1). The
journal determines which survivors wait, which weights were validated and what Optuna knows, so that a resumed run
continues where it stopped.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from nkat_ray.record.journal import RunState, TrialRecord

if TYPE_CHECKING:
    from nkat_ray.search.stage1 import Stage1


class SurvivorValidation(Protocol):
    """The part of Stage 2's validation that Stage 1 uses."""

    def submit(self, record: TrialRecord) -> None:
        """Submit the missing validations of a survivor, with the best weights that its trial has now."""

    def collect(self, *, wait: bool) -> None:
        """Write finished validations into the journal; with `wait`, wait briefly for one to finish."""

    def score(self, record: TrialRecord) -> float | None:
        """Return the validation Global TPE of a trial's best weights.

        None until all datasets are in the journal; NaN if no dataset counts.
        """

    @property
    def tasks(self) -> int:
        """Number of tasks that were submitted and not yet collected."""

    @property
    def busy(self) -> Collection[int]:
        """Numbers of the trials with such tasks."""


class Feedback:
    """Schedule the survivors' validations, and report each survivor to Optuna when its validation is complete.

    A survivor that has ended takes precedence over new trials: its weights are final and its slot is free. A survivor
    that is still training is validated only on a slot that no new trial needs; if its score improves afterwards, it is
    validated again after its end.
    """

    def __init__(self, validation: SurvivorValidation, state: RunState, gate: float, stage: "Stage1") -> None:
        self._validation, self._state, self._gate, self._stage = validation, state, gate, stage
        self._reported: set[int] = set()
        self._live: set[int] = set()

    def on_trial_start(self, record: TrialRecord) -> None:
        """Count a trial that occupies a slot."""
        self._live.add(record.trial)

    def on_end(self, record: TrialRecord) -> None:
        """Report an ended trial to Optuna, unless it is a survivor whose Global TPE is still unknown."""
        self._live.discard(record.trial)
        if record not in self._unreported():
            self._stage.tell(record)

    def holds(self) -> bool:
        """Return whether a new trial would occupy a slot that a validation needs."""
        self.advance()
        waits = any(record.ended and record.trial not in self._validation.busy for record in self._unreported())
        return waits or not self._has_slot()

    def score(self, record: TrialRecord) -> float | None:
        """Return the value that Optuna receives for a survivor; None while it is unknown."""
        return self._validation.score(record)

    def advance(self, *, wait: bool = False) -> None:
        """Collect finished validations, report complete ones to Optuna, and submit new ones to free slots."""
        self._validation.collect(wait=wait and self._validation.tasks > 0)
        for record in sorted(self._unreported(), key=lambda record: not record.ended):
            if record.trial in self._validation.busy:
                continue
            known = self._validation.score(record) is not None
            if known and record.ended:
                self._stage.tell(record)
                self._reported.add(record.trial)
            elif not known and self._has_slot() and (record.ended or self._stage.exhausted()):
                self._validation.submit(record)

    def finish(self) -> None:
        """Wait until every survivor is reported to Optuna; call this after the last trial has ended."""
        self._live.clear()
        while self._unreported():
            self._stage.tick()
            self.advance(wait=True)

    def _unreported(self) -> list[TrialRecord]:
        """Return the survivors not yet reported to Optuna, except those that failed after passing the gate."""
        survivors = (self._state.trials[number] for number in self._state.survivors(self._gate))
        return [r for r in survivors if r.trial not in self._reported and not r.failed]

    def _has_slot(self) -> bool:
        return len(self._live) + self._validation.tasks < self._stage.slots()
