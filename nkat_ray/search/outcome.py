"""Translate an ended trial into Optuna's terms (docs/spec.md section 6.1): pure functions of its record."""

import math
from typing import Final, NamedTuple

from optuna.trial import TrialState

from nkat_ray.metrics import EPOCH, LOCAL_TPE
from nkat_ray.record.journal import TrialRecord

GATE_CONSTRAINT: Final = "gate"  # <= 0 if the trial passed; set only if the gate's decision was final
PRUNED_REASONS: Final = ("asha", "smoke", "gate", "budget", "user")
JUDGED_REASONS: Final = ("gate", "smoke", "finished")  # reasons after which the gate's decision is final


class Outcome(NamedTuple):
    """A trial's state in Optuna and, for COMPLETE, its value."""

    state: TrialState
    value: float | None = None


def outcome_of(record: TrialRecord, gate: float, score: float | None) -> Outcome | None:
    """Return the outcome of an ended trial; None while it is unknown.

    Args:
        score: a survivor's value for Optuna; NaN if it could not be determined, None if it is not known yet.
    """
    if record.best_row() is None or record.failed:
        return Outcome(TrialState.FAIL)
    if record.stop_reason in PRUNED_REASONS and not record.passed(gate):
        return Outcome(TrialState.PRUNED)
    if score is None:
        return None
    return Outcome(TrialState.COMPLETE, score) if math.isfinite(score) else Outcome(TrialState.FAIL)


def intermediate_values(record: TrialRecord) -> dict[int, float]:
    """Return a trial's finite scores by epoch."""
    return {row[EPOCH]: row[LOCAL_TPE] for row in record.finite_rows()}


def constraints(record: TrialRecord, gate: float) -> dict[str, float]:
    """Return gate minus best Local TPE (<= 0: passed) if the gate's decision is final; else nothing."""
    judged = record.passed(gate) or record.stop_reason in JUDGED_REASONS
    return {GATE_CONSTRAINT: gate - record.best_score} if judged and math.isfinite(record.best_score) else {}
