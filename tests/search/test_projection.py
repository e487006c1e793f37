import math
import pickle
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nkat_ray.search.projection import CONFIDENCE, MIN_FINISHED, GateProjection, student_t

EPOCHS = 6

scores = st.floats(0, 1)
whole_curve = st.lists(scores, min_size=EPOCHS, max_size=EPOCHS)
curves_of_any_length = st.lists(
    st.lists(scores, min_size=1, max_size=EPOCHS), min_size=MIN_FINISHED, max_size=MIN_FINISHED + 4
)


def teach(projection: GateProjection, key: object, curve: list[float]) -> None:
    for epoch, score in enumerate(curve, start=1):
        projection.learn(key, epoch, score)


def taught(curves: list[list[float]]) -> GateProjection:
    projection = GateProjection(max_epochs=EPOCHS)
    for number, curve in enumerate(curves):
        teach(projection, number, curve)
    return projection


def reference(curves: list[list[float]], best: float, epoch: int) -> tuple[float, float] | None:
    """Expected and largest final score from the definition, with the standard library alone."""
    gains = [max(curve) - max(curve[:epoch]) for curve in curves if len(curve) == EPOCHS]
    seen = [max(curve) - max(curve[:epoch]) for curve in curves if len(curve) > epoch]
    if len(gains) < MIN_FINISHED:
        return None
    n = len(gains)
    wide = student_t(CONFIDENCE, n - 1) * statistics.stdev(gains) * math.sqrt(1 + 1 / n)
    return best + statistics.fmean(gains), best + max(*seen, statistics.fmean(gains) + wide)


@given(curves_of_any_length, st.lists(scores, min_size=1, max_size=EPOCHS - 1))
def test_it_equals_its_definition(curves: list[list[float]], own: list[float]) -> None:
    projection, epoch = taught(curves), len(own)
    teach(projection, "own", own)
    # Its own part of a curve may already show the largest gain from an earlier epoch, never from this one.
    expected = reference(curves, max(own), epoch)
    found = projection.project("own", epoch)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.expected, found.upper) == pytest.approx(expected, abs=1e-9)
        assert found.finished == sum(len(curve) == EPOCHS for curve in curves)


@given(curves_of_any_length, st.randoms())
def test_the_order_of_results_and_their_repetition_change_nothing(curves: list[list[float]], random: object) -> None:
    rows = [(number, epoch) for number, curve in enumerate(curves) for epoch in range(1, len(curve) + 1)]
    interleaved = GateProjection(max_epochs=EPOCHS)
    for number, epoch in sorted(rows, key=lambda row: row[1]):  # all first epochs, then all second ones
        for _ in range(2):
            interleaved.learn(number, epoch, curves[number][epoch - 1])
    one_by_one = taught(curves)
    for number, epoch in rows:
        first, second = one_by_one.project(number, epoch), interleaved.project(number, epoch)
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert first.upper == pytest.approx(second.upper, abs=1e-9)


@given(st.lists(whole_curve, min_size=MIN_FINISHED, max_size=MIN_FINISHED + 4))
def test_no_curve_that_it_has_seen_would_have_been_stopped(curves: list[list[float]]) -> None:
    projection = taught(curves)
    for number, curve in enumerate(curves):
        for epoch in range(1, EPOCHS):
            found = projection.project(number, epoch)
            assert found is not None
            assert found.upper >= max(curve) - 1e-12


@pytest.mark.parametrize("finished", range(MIN_FINISHED))
def test_silent_until_enough_curves_are_finished(finished: int) -> None:
    projection = taught([[0.1, 0.2, 0.3, 0.3, 0.3, 0.3]] * finished + [[0.1] * (EPOCHS - 1)] * 20)
    projection.learn("own", 1, 0.1)
    assert projection.project("own", 1) is None
    teach(projection, "last", [0.1] * EPOCHS)
    assert (projection.project("own", 1) is None) == (finished + 1 < MIN_FINISHED)


def test_silent_at_the_last_epoch_and_about_what_it_has_not_seen() -> None:
    projection = taught([[0.1] * EPOCHS] * MIN_FINISHED)
    teach(projection, "own", [0.1] * EPOCHS)
    assert projection.project("own", EPOCHS) is None
    assert projection.project("stranger", 1) is None
    projection.learn("late", 3, 0.1)
    assert projection.project("late", 2) is None
    assert projection.project("late", 3) is not None


def test_curves_that_are_all_alike_leave_no_room() -> None:
    projection = taught([[0.1, 0.2, 0.3, 0.4, 0.5, 0.5]] * MIN_FINISHED)
    projection.learn("own", 2, 0.2)
    found = projection.project("own", 2)
    assert found is not None
    assert (found.expected, found.upper) == pytest.approx((0.5, 0.5))


def test_a_stopped_curve_that_gained_more_widens_the_bound() -> None:
    projection = taught([[0.1, 0.2, 0.3, 0.4, 0.5, 0.5]] * MIN_FINISHED)
    projection.learn("own", 1, 0.1)
    before = projection.project("own", 1)
    teach(projection, "stopped", [0.1, 0.7])
    after = projection.project("own", 1)
    assert before is not None
    assert after is not None
    assert (before.upper, after.upper) == pytest.approx((0.5, 0.7))
    assert after.expected == before.expected  # only finished curves say what is expected


def test_the_best_so_far_counts_not_the_last_score() -> None:
    projection = taught([[0.1] * EPOCHS] * MIN_FINISHED)
    teach(projection, "own", [0.4, 0.2])
    found = projection.project("own", 2)
    assert found is not None
    assert found.upper == pytest.approx(0.4)


@given(st.lists(whole_curve, min_size=MIN_FINISHED, max_size=MIN_FINISHED + 2), st.integers(1, EPOCHS - 1))
def test_a_new_driver_goes_on_where_the_killed_one_was(curves: list[list[float]], cut: int) -> None:
    """The last trial is cut off, and continues under its number."""
    uncut = taught(curves)
    *ended, last = curves
    journal = [*enumerate(ended), (len(ended), last[:cut])]
    again = GateProjection(
        max_epochs=EPOCHS, earlier=[(number, dict(enumerate(curve, start=1))) for number, curve in journal]
    )
    for epoch in range(cut + 1, EPOCHS + 1):
        again.learn(len(ended), epoch, last[epoch - 1])
    for projection in (uncut, again):
        projection.learn("own", 1, 0.5)
    assert again.project("own", 1) == uncut.project("own", 1)


def test_pickled_it_has_learnt_the_same() -> None:
    projection = taught([[0.1, 0.2, 0.3, 0.3, 0.3, 0.3], [0.2] * EPOCHS] * MIN_FINISHED)
    again = pickle.loads(pickle.dumps(projection))
    for one in (projection, again):
        one.learn("own", 1, 0.1)
    assert again.project("own", 1) == projection.project("own", 1)


def test_epochs_beyond_the_last_are_ignored() -> None:
    projection = taught([[0.1] * EPOCHS] * MIN_FINISHED)
    projection.learn("own", 1, 0.1)
    before = projection.project("own", 1)
    projection.learn("other", EPOCHS + 1, 1.0)
    projection.learn("other", 0, 1.0)
    assert projection.project("own", 1) == before


@pytest.mark.parametrize("max_epochs", [0, -1])
def test_no_epochs_are_refused(max_epochs: int) -> None:
    with pytest.raises(ValueError, match=f"max_epochs is {max_epochs}"):
        GateProjection(max_epochs=max_epochs)


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [(0.999, 9, 4.297), (0.999, 19, 3.579), (0.999, 1000, 3.098), (0.975, 9, 2.262), (0.975, 19, 2.093)],
)
def test_students_t_is_that_of_the_tables(probability: float, degrees: int, expected: float) -> None:
    assert student_t(probability, degrees) == pytest.approx(expected, rel=5e-3)


def test_the_false_stops_of_exchangeable_curves_stay_below_two_percent() -> None:
    """Saturating curves with noise: of the trials that would pass the gate, hardly any is stopped before."""
    generator = np.random.default_rng(0)
    stopped = passers = saved = 0
    for _ in range(20):
        final, speed = generator.normal(0.3, 0.05, (60, 1)), generator.uniform(0.2, 1.0, (60, 1))
        table = final * (1 - np.exp(-speed * np.arange(1, 11))) + generator.normal(0, 0.01, (60, 10))
        gate = float(np.quantile(table.max(1), 0.8))
        projection = GateProjection(max_epochs=10)
        for number, curve in enumerate(table):
            for epoch, score in enumerate(curve, start=1):
                projection.learn(number, epoch, score)
                found = projection.project(number, epoch)
                if found is not None and curve[:epoch].max() < gate and found.upper < gate:
                    stopped += curve.max() >= gate
                    saved += 10 - epoch
                    break
            passers += curve.max() >= gate
    assert passers == 240
    assert stopped / passers <= 0.02
    assert saved > 500  # it does stop trials: a bound that never bites would pass as well
