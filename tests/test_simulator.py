"""The simulator of benchmarks/search: what it counts, and that its decisions are those of the rules it is given."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nkat_ray.config import Choice, Span

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
    outcome = sim.simulate(table, sim.Rules(), sim.InOrder(range(4)), slots=2)
    assert (outcome.epochs, outcome.seconds, outcome.best) == (12, 6.0, 0.3)
    assert outcome.ends == dict.fromkeys(range(4), ("finished", 3))


def test_the_gate_ends_what_never_reached_it_and_lets_the_rest_finish(sim: ModuleType) -> None:
    table = [curve(sim, [0.1, 0.3, 0.2]), curve(sim, [0.1, 0.2, 0.2])]
    outcome = sim.simulate(table, sim.Rules(gate=0.3), sim.InOrder([1, 0]), slots=1)
    assert outcome.ends == {1: ("gate", 3), 0: ("finished", 3)}
    assert outcome.projected == set()


def test_asha_stops_the_weaker_of_two_at_the_first_rung(sim: ModuleType) -> None:
    table = [curve(sim, [0.2, 0.3, 0.4, 0.5]), curve(sim, [0.1, 0.3, 0.4, 0.9])]
    outcome = sim.simulate(table, sim.Rules(asha=True, grace=1), sim.InOrder([0, 1]), slots=1)
    assert outcome.ends == {0: ("finished", 4), 1: ("asha", 1)}
    assert (outcome.epochs, outcome.best) == (5, 0.5)
    assert [outcome.epochs_until(score) for score in (0.0, 0.5, 0.51)] == [1, outcome.scores.index(0.5) + 1, None]


def test_the_projection_stops_a_hopeless_trial_after_enough_have_finished(sim: ModuleType) -> None:
    table = [curve(sim, [0.2, 0.3, 0.3])] * 10 + [curve(sim, [0.1, 0.2, 0.2])]
    rules = sim.Rules(gate=0.3, projection=True)
    outcome = sim.simulate(table, rules, sim.InOrder(range(11)), slots=1)
    assert outcome.ends[10] == ("gate", 1)
    assert outcome.projected == {10}
    before = sim.simulate(table, rules, sim.InOrder([10, *range(10)]), slots=1)
    assert before.ends[10] == ("gate", 3)


def test_a_searcher_uses_each_row_once_and_hears_of_every_end(sim: ModuleType) -> None:
    space = {"x": Span(0.0, 1.0)}
    table = [curve(sim, [x / 2, x], x) for x in np.linspace(0, 1, 8)]
    with sim.by_searcher(table, space, trials=6, seed=0, gate=0.5) as source:
        outcome = sim.simulate(table, sim.Rules(gate=0.5), source, slots=2)
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


def test_mean_and_interval_are_students(sim: ModuleType) -> None:
    mean, half, error = sim.mean_interval([float(n) for n in range(20)])
    assert (mean, error) == pytest.approx((9.5, 1.32288), abs=1e-4)
    assert half == pytest.approx(2.0930 * 1.32288, rel=1e-3)
