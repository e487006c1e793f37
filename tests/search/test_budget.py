import pickle
from typing import Any

import pytest
from ray.tune.stopper import CombinedStopper

from nkat_ray.search.budget import SurvivorBudget
from nkat_ray.search.gate import LocalTPEGate


def result(trial: int, score: Any, epoch: int = 1, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "val_accuracy": 0.5, "local_tpe": score, "config": {"trial": trial}, **more}


def test_once_enough_have_passed_the_trials_below_the_best_survivor_end() -> None:
    budget = SurvivorBudget(2, gate=0.6)
    assert not budget("a", result(0, 0.5))
    assert not budget("b", result(1, 0.6))  # the first survivor
    assert not budget("a", result(0, 0.59, epoch=2))
    assert not budget("c", result(2, 0.7))  # the second: enough
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
    assert budget("c", result(2, 0.7, epoch=3))
    assert not budget.stop_all()


@pytest.mark.parametrize("score", [0.1, float("nan"), float("inf"), None])
def test_every_kind_of_score_that_is_none_ends(score: Any) -> None:
    assert SurvivorBudget(1, gate=0.6, passed={0: 0.6})("x", result(7, score))


def test_a_restart_knows_who_passed_from_the_journal_and_from_the_trial_itself() -> None:
    assert SurvivorBudget(1, gate=0.6, passed={4: 0.65})("x", result(5, 0.3))
    assert not SurvivorBudget(1, gate=0.6, passed={4: 0.65})("x", result(4, 0.3))
    assert SurvivorBudget(1, gate=0.6, passed={4: 0.65})("x", result(5, 0.3, best_local_tpe=0.6))
    assert not SurvivorBudget(1, gate=0.6, passed={4: 0.65})("x", result(5, 0.3, best_local_tpe=0.65))


def test_a_trial_that_returns_without_metrics_has_a_reason_of_its_own() -> None:
    row: dict[str, Any] = {"done": True, "config": {"trial": 1}}
    assert not SurvivorBudget(1, gate=0.6, passed={0: 0.6})("x", row)
    assert "stop_reason" not in row


def test_the_gate_comes_first() -> None:
    both = CombinedStopper(LocalTPEGate(0.6, max_epochs=3), SurvivorBudget(1, gate=0.6, passed={0: 0.6}))
    for row, reason in (
        (result(1, 0.3, epoch=3), "gate"), (result(2, float("nan")), "nan"), (result(3, 0.3), "budget"),
    ):  # fmt: skip
        assert both("x", row)
        assert row["stop_reason"] == reason


def test_it_survives_pickling_and_refuses_a_limit_of_nothing() -> None:
    budget = SurvivorBudget(1, gate=0.6)
    budget("a", result(0, 0.9))
    assert pickle.loads(pickle.dumps(budget))("b", result(1, 0.1))
    with pytest.raises(ValueError, match="limit is 0; allowed: >= 1"):
        SurvivorBudget(0, gate=0.6)
