"""What Optuna learns; the study itself is in test_searcher.py."""

import math

import pytest
from optuna.trial import TrialState

from nkat_ray.record.journal import TrialRecord
from nkat_ray.search.outcome import GATE_CONSTRAINT, Outcome, constraints, intermediate_values, outcome_of

GATE = 0.6
COMPLETE, PRUNED, FAIL = Outcome(TrialState.COMPLETE, 0.7), Outcome(TrialState.PRUNED), Outcome(TrialState.FAIL)


def record(*scores: float, reason: str) -> TrialRecord:
    curve = {epoch: {"epoch": epoch, "local_tpe": score} for epoch, score in enumerate(scores, start=1)}
    return TrialRecord(0, {}, 0, 0, curve=curve, stop_reason=reason)


@pytest.mark.parametrize("reason", ["finished", "asha", "budget", "smoke", "user"])
def test_a_survivor_is_complete_with_what_it_is_worth_however_it_ended(reason: str) -> None:
    trial = record(0.65, 0.2, reason=reason)
    assert outcome_of(trial, GATE, 0.7) == COMPLETE
    assert outcome_of(trial, GATE, None) is None  # not known yet
    assert outcome_of(trial, GATE, math.nan) == FAIL
    assert constraints(trial, GATE) == {GATE_CONSTRAINT: pytest.approx(-0.05)}


@pytest.mark.parametrize(
    ("reason", "judged"), [("gate", True), ("smoke", True), ("asha", False), ("budget", False), ("user", False)]
)
def test_a_trial_that_did_not_pass_is_pruned_and_its_gate_is_a_constraint_where_it_was_judged(
    reason: str, judged: bool
) -> None:
    trial = record(0.5, math.nan, 0.4, reason=reason)
    assert outcome_of(trial, GATE, None) == PRUNED
    assert constraints(trial, GATE) == ({GATE_CONSTRAINT: pytest.approx(0.1)} if judged else {})
    assert intermediate_values(trial) == {1: 0.5, 3: 0.4}


def test_nothing_is_learned_from_a_fault_or_from_a_trial_without_a_finite_score() -> None:
    for trial in (record(0.9, reason="nan"), record(0.9, reason="error"), record(math.nan, reason="budget")):
        assert outcome_of(trial, GATE, 0.7) == FAIL
    assert constraints(record(math.nan, reason="gate"), GATE) == {}


def test_a_survivor_of_a_lower_gate_is_complete_and_infeasible() -> None:
    """A trial of an earlier run that is judged by this run's gate."""
    trial = record(0.5, reason="finished")
    assert outcome_of(trial, GATE, 0.5) == Outcome(TrialState.COMPLETE, 0.5)
    assert constraints(trial, GATE) == {GATE_CONSTRAINT: pytest.approx(0.1)}
