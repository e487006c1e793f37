"""Test the simulator of benchmarks/search: what it counts, and that it decides by the rules it is given."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nkat_ray.space import Choice, Span

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "search"


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import simulator

    yield simulator
    del sys.modules["simulator"]


def curve(sim: ModuleType, scores: list[float], x: float = 0.0) -> object:
    return sim.Curve({"x": x}, scores, scores, [1.0] * len(scores))


def test_without_rules_every_trial_runs_to_its_end_on_its_slot(sim: ModuleType) -> None:
    table = [curve(sim, [0.1, 0.3, 0.2])] * 4
    outcome = sim.simulate(table, sim.Rule(), sim.InOrder(range(4)), slots=2)
    assert (outcome.epochs, outcome.seconds, outcome.best) == (12, 6.0, 0.3)
    assert outcome.ends == dict.fromkeys(range(4), ("finished", 3))


def test_the_gate_ends_what_never_reached_it_and_lets_the_rest_finish(sim: ModuleType) -> None:
    table = [curve(sim, [0.1, 0.3, 0.2]), curve(sim, [0.1, 0.2, 0.2])]
    outcome = sim.simulate(table, sim.Rule(), sim.InOrder([1, 0]), slots=1, gate=0.3)
    assert outcome.ends == {1: ("gate", 3), 0: ("finished", 3)}
    assert (outcome.reached(0.3), outcome.reached(0.2)) == ({0}, {0, 1})


def test_time_passes_by_each_curves_own_seconds(sim: ModuleType) -> None:
    table = [sim.Curve({}, [0.1, 0.5], [0.1, 0.5], [2.0, 3.0]), sim.Curve({}, [0.4, 0.2], [0.4, 0.2], [1.0, 1.5])]
    outcome = sim.simulate(table, sim.Rule(), sim.InOrder([0, 1]), slots=2)
    assert outcome.results == [(1.0, 1, 0.4), (2.0, 0, 0.1), (2.5, 1, 0.2), (5.0, 0, 0.5)]
    assert [outcome.seconds_until(score) for score in (0.4, 0.5, 0.6)] == [1.0, 5.0, None]


@pytest.mark.parametrize(("rule", "reason"), [("RayASHA", "asha"), ("OptunaHalving", "pruned")])
def test_the_weaker_of_two_stops_at_the_first_rung(rule: str, reason: str, sim: ModuleType) -> None:
    table = [curve(sim, [0.2, 0.3, 0.4, 0.5]), curve(sim, [0.1, 0.3, 0.4, 0.9])]
    made = sim.RayASHA(epochs=4) if rule == "RayASHA" else sim.OptunaHalving()
    outcome = sim.simulate(table, made, sim.InOrder([0, 1]), slots=1)
    assert outcome.ends == {0: ("finished", 4), 1: (reason, 1)}
    assert (outcome.epochs, outcome.best) == (5, 0.5)


def test_asha_that_promotes_resumes_the_best_third_of_a_rung_before_it_starts_a_new_trial(sim: ModuleType) -> None:
    """Worked out by hand; the rungs are at epochs 1 and 3 of four."""
    table = [curve(sim, [score, score, score, score + 0.1]) for score in (0.3, 0.1, 0.2, 0.5, 0.6, 0.4)]
    outcome = sim.simulate(table, sim.PromotingASHA(epochs=4), sim.InOrder(range(6)), slots=1)
    assert [row for _, row, _ in outcome.results] == [
        0, 1, 2,  # of the three at the first rung 0 is the best
        0, 0,  # and alone at the second
        3, 3, 3,  # the best of four
        4, 4, 4, 4,  # the best of five; then, at the second rung, the best of three
        5,  # a third of six is two, 4 and 3, which have been promoted
    ]  # fmt: skip
    assert outcome.ends[4] == ("finished", 4)
    assert {row: end for row, end in outcome.ends.items() if row != 4} == {
        0: ("pause", 3), 1: ("pause", 1), 2: ("pause", 1), 3: ("pause", 3), 5: ("pause", 1)
    }  # fmt: skip


def test_one_epoch_then_the_best_waits_for_all_first_epochs(sim: ModuleType) -> None:
    table = [curve(sim, [score, score]) for score in (0.3, 0.1, 0.2)]
    outcome = sim.simulate(table, sim.OneEpochThenBest(2), sim.InOrder(range(3)), slots=2)
    assert outcome.results == [(1.0, 0, 0.3), (1.0, 1, 0.1), (2.0, 2, 0.2), (3.0, 0, 0.3), (3.0, 2, 0.2)]
    assert outcome.ends == {0: ("finished", 2), 1: ("pause", 1), 2: ("finished", 2)}


def test_a_resume_may_cost_time(sim: ModuleType) -> None:
    table = [curve(sim, [0.1, 0.2])]
    outcome = sim.simulate(table, sim.OneEpochThenBest(1), sim.InOrder([0]), slots=1, resume_epochs=0.5)
    assert [now for now, _, _ in outcome.results] == [1.0, 2.5]


def test_a_searcher_uses_each_row_once_and_hears_of_every_end(sim: ModuleType) -> None:
    space = {"x": Span(0.0, 1.0)}
    table = [curve(sim, [x / 2, x], x) for x in np.linspace(0, 1, 8)]
    with sim.by_searcher(table, space, trials=6, seed=0, gate=0.5) as source:
        outcome = sim.simulate(table, sim.Rule(), source, slots=2, gate=0.5)
        records = source.journal.state.trials.values()
        study = source._searcher.study
        assert len(outcome.ends) == len(records) == 6
        assert all(record.ended and len(record.curve) == 2 for record in records)
        assert all(trial.state.is_finished() for trial in study.trials)
        assert sum(record.passed(0.5) for record in records) == outcome.reasons()["finished"]


def test_distance_is_a_share_of_each_domains_range(sim: ModuleType) -> None:
    space = {"lr": Span(1e-4, 1e-2, log=True), "depth": Span(1, 3, step=1), "stem": Choice(("off", "tiny", None))}
    a, b = {"lr": 1e-4, "depth": 1, "stem": None}, {"lr": 1e-3, "depth": 3, "stem": "off"}
    assert sim.distance(space, a, b) == pytest.approx((0.5 + 1 + 1) / 3)
    assert sim.distance(space, a, a) == 0


def test_a_curve_that_is_not_whole_is_left_out(sim: ModuleType) -> None:
    rows = [
        {"curve": number, "x": 0.5, "epoch": epoch, "local_tpe": score, "val_accuracy": score, "epoch_s": 1.0}
        for number, scores in enumerate([[0.1, 0.2], [0.1, float("nan")], [0.3]])
        for epoch, score in enumerate(scores, start=1)
    ]
    (only,) = sim.curves_of(reversed(rows), {"x": Span(0, 1)})
    assert (only.scores, only.best, only.params) == ([0.1, 0.2], 0.2, {"x": 0.5})


def test_a_quiet_machine_takes_the_shortest_epoch_of_the_same_structure(sim: ModuleType) -> None:
    table = [
        sim.Curve({"depth": depth, "lr": lr}, [0.1, 0.2], [0.1, 0.2], seconds)
        for depth, lr, seconds in [(1, 1.0, [9.0, 3.0]), (1, 2.0, [2.0, 70.0]), (2, 1.0, [5.0, 5.5])]
    ]
    quiet = sim.on_quiet_machine(table, ["depth"])
    assert [c.seconds for c in quiet] == [[2.0, 2.0], [2.0, 2.0], [5.0, 5.0]]
    assert [c.params for c in quiet] == [c.params for c in table]


def test_orders_by_cost(sim: ModuleType) -> None:
    import replay

    costs = [5.0, 1.0, 3.0, 1.0]
    assert replay.cheapest_first(costs)([0, 3, 2, 1]) == [3, 1, 2, 0]
    assert replay.cheaper_of_two(costs)([0, 3, 2, 1]) == [3, 2, 1, 0]  # 0 meets each of them, and is dearer
    assert replay.cheaper_of_two(costs)([1]) == [1]
    assert replay.ratio([(1.0, 2.0), (2.0, 4.0), (None, 1.0)]) == "0.50 (0.50 to 0.50) (2 of 3)"


def test_mean_and_interval_are_students(sim: ModuleType) -> None:
    mean, half, error = sim.mean_interval([float(n) for n in range(20)])
    assert (mean, error) == pytest.approx((9.5, 1.32288), abs=1e-4)
    assert half == pytest.approx(2.0930 * 1.32288, rel=1e-3)
