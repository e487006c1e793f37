import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.stopper import CombinedStopper

from nkat_ray.config import RunConfig
from nkat_ray.metrics import BEST_LOCAL_TPE
from nkat_ray.record.journal import RunState, TrialRecord
from nkat_ray.search import budget as module
from nkat_ray.search.budget import Budget, only_failures
from nkat_ray.search.gate import LocalTPEGate


def result(trial: int, score: Any, epoch: int = 1, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "val_accuracy": 0.5, "local_tpe": score, "config": {"trial": trial}, **more}


def state(**scores: float) -> RunState:
    """What the journal says: ten trials, some with their best score, after one epoch."""
    known = {int(name[1:]): {1: {"epoch": 1, "local_tpe": score}} for name, score in scores.items()}
    return RunState({n: TrialRecord(n, {}, 0, n, curve=known.get(n, {})) for n in range(10)}, attempts=[(0.0, 1.0)])


def survivor_budget(limit: int, known: RunState) -> Budget:
    return Budget(RunConfig(gate=0.6, max_survivors=limit), known)


def test_once_enough_have_passed_the_trials_below_the_best_survivor_end() -> None:
    known = state(t0=0.5, t1=0.6)
    budget = survivor_budget(2, known)
    assert not budget("a", result(0, 0.59, epoch=2))
    assert not budget("c", result(2, 0.7))  # the second survivor, not in the journal yet
    known.apply({"event": "result", "time_s": 1.0, "trial": 2, "row": result(2, 0.7), "checkpoint": None})
    last = result(0, 0.59, epoch=3)
    assert budget("a", last)
    assert budget("a", last)  # asked twice
    assert last["stop_reason"] == "budget"
    assert last["stop_detail"] == (
        "epoch 3: 2 trials have passed the gate, which is enough (max_survivors); the best has 0.7000"
    )
    assert budget("b", result(1, 0.69, epoch=2))  # a survivor, but not the best
    assert not budget("c", result(2, 0.1, epoch=2))  # the best survivor, whatever its score now
    assert not budget("d", result(3, 0.7))  # level with it
    assert not budget("e", result(4, 0.71))  # better: now it is the best
    known.apply({"event": "result", "time_s": 1.0, "trial": 4, "row": result(4, 0.71), "checkpoint": None})
    assert budget("c", result(2, 0.7, epoch=3))
    assert not budget.stop_all()


@pytest.mark.parametrize("score", [0.1, float("nan"), float("inf"), None])
def test_every_kind_of_score_that_is_none_ends(score: Any) -> None:
    assert survivor_budget(1, state(t0=0.6))("x", result(7, score))


def test_a_restart_knows_who_passed_from_the_journal_and_from_the_trial_itself() -> None:
    assert survivor_budget(1, state(t4=0.65))("x", result(5, 0.3))
    assert not survivor_budget(1, state(t4=0.65))("x", result(4, 0.3))
    assert survivor_budget(1, state(t4=0.65))("x", result(5, 0.3, **{BEST_LOCAL_TPE: 0.6}))
    assert not survivor_budget(1, state(t4=0.65))("x", result(5, 0.3, **{BEST_LOCAL_TPE: 0.65}))


def test_a_trial_that_returns_without_metrics_has_a_reason_of_its_own() -> None:
    row: dict[str, Any] = {"done": True, "config": {"trial": 1}}
    assert not survivor_budget(1, state(t0=0.6))("x", row)
    assert "stop_reason" not in row


def test_the_gate_comes_first() -> None:
    both = CombinedStopper(LocalTPEGate(0.6, max_epochs=3), survivor_budget(1, state(t0=0.6)))
    for row, reason in (
        (result(1, 0.3, epoch=3), "gate"), (result(2, float("nan")), "nan"), (result(3, 0.3), "budget"),
    ):  # fmt: skip
        assert both("x", row)
        assert row["stop_reason"] == reason


def test_it_pickles_as_nothing() -> None:
    assert vars(pickle.loads(pickle.dumps(survivor_budget(1, state(t0=0.9))))) == {}


def test_stage_1_is_closed_once_enough_have_passed() -> None:
    known = state(t0=0.9, t1=0.5)
    assert survivor_budget(1, known).closed()
    assert not survivor_budget(2, known).closed()
    assert not Budget(RunConfig(gate=0.6), known).closed()


def test_an_unfinished_trial_of_an_earlier_driver_ends_where_enough_others_are_better() -> None:
    budget = survivor_budget(1, state(t0=0.9, t1=0.5))
    stop = budget.stop(1, 1, 0.5)
    assert stop is not None
    assert (stop.reason, stop.detail) == (
        "budget", "epoch 1: 1 trials have passed the gate, which is enough (max_survivors); the best has 0.9000"
    )  # fmt: skip
    assert budget.stop(0, 1, 0.9) is None


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The driver's clock, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def timed(hours: float | None, known: RunState | None = None) -> Budget:
    return Budget(RunConfig(gate=0.6, stage1_hours=hours), known or state())


def test_the_time_of_earlier_drivers_counts(clock: list[float]) -> None:
    earlier = RunState(attempts=[(0.0, 600.0), (5000.0, 5300.0), (9000.0, 9000.0)])
    budget = timed(1, earlier)
    assert budget.seconds_left() == 2700
    clock[0] += 2699
    assert (budget.seconds_left(), budget.expired(), budget.closed()) == (1, False, False)
    clock[0] += 2
    assert (budget.seconds_left(), budget.expired(), budget.closed()) == (0, True, True)


def test_without_a_limit_there_is_always_time(clock: list[float]) -> None:
    budget = timed(None)
    clock[0] += 1e9
    assert (budget.seconds_left(), budget.expired(), budget.closed()) == (None, False, False)


def test_after_the_time_each_trial_ends_at_its_next_result_unless_it_says_why_itself(clock: list[float]) -> None:
    budget = timed(0.5)
    assert not budget("a", result(0, 0.5))
    clock[0] += 1800
    row = result(0, 0.5, epoch=7)
    assert budget("a", row)
    assert (row["stop_reason"], row["stop_detail"]) == ("budget", "epoch 7: Stage 1's time is up")
    finished = result(0, 0.7, epoch=9, stop_reason="finished")
    assert not budget("a", finished)
    assert not budget("a", {"stop_reason": "budget"})
    assert finished["stop_reason"] == "finished"
    assert not budget.stop_all()
    stop = budget.stop(0, 7, 0.5)
    assert stop is not None
    assert stop.columns().items() <= row.items()


# --- failures ---------------------------------------------------------------------------------------------------------


def ended(reason: str | None, *scores: float, at: float = 1.0) -> TrialRecord:
    """A trial that has ended with a reason (None: it is under way), after epochs with these scores."""
    curve = {epoch: {"epoch": epoch, "local_tpe": score} for epoch, score in enumerate(scores, 1)}
    detail = None if reason is None else f"{reason} at {at:g} s"
    return TrialRecord(0, {}, 0, 0, curve=curve, stop_reason=reason, stop_detail=detail, ended_s=at)


NAN = float("nan")


@pytest.mark.parametrize(
    ("records", "limit", "too_many"),
    [
        ([], 1, False),
        ([ended("error")], 2, False),
        ([ended("error")] * 2, 2, True),
        ([ended("error")] * 3, 2, True),  # several fail at once, or a run was resumed
        ([ended("error")] * 3, None, False),
        ([ended("nan", NAN), ended("error")], 2, True),
        ([ended("error", 0.3), ended("nan", 0.3, NAN)], 2, True),  # they had scores, and failed all the same
        ([ended("error")] * 2 + [ended(None)], 2, True),  # one is under way, and has nothing yet
        ([ended("error")] * 2 + [ended(None, NAN)], 2, True),
        ([ended("error")] * 2 + [ended(None, 0.0)], 2, False),  # it trains
        ([ended("error")] * 2 + [ended("asha", 0.1)], 2, False),
        ([ended("error")] * 2 + [ended("budget")], 2, True),  # stopped before its first epoch: it says nothing
        ([ended("gate", 0.1)] + [ended("error")] * 99, 2, False),  # later failures are the trials' own
    ],
)
def test_as_many_failures_as_allowed_and_no_success_are_too_many(
    records: list[TrialRecord], limit: int | None, too_many: bool
) -> None:
    assert (only_failures(records, limit) is not None) is too_many


def test_the_error_that_came_first_is_named_whatever_its_trials_number() -> None:
    records = [ended("error", at=9.0), ended("nan", NAN, at=2.0), ended("error", at=5.0)]
    records[1].trial = 7
    assert only_failures(records, 3) == (
        "3 trials have failed and none has succeeded (max_failed is 3); the first error, of trial 7: nan at 2 s; "
        "remove its cause, then --resume"
    )
