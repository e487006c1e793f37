import copy
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nkat_ray.metrics import BEST_LOCAL_TPE, STOP_DETAIL, tpe_score
from nkat_ray.search.gate import LocalTPEGate

NAN, INF = math.nan, math.inf


def result(epoch: Any = 1, val_accuracy: Any = 0.5, local_tpe: Any = 0.3, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "val_accuracy": val_accuracy, "local_tpe": local_tpe, **more}


def verdict(gate: LocalTPEGate, row: dict[str, Any], trial_id: str = "t") -> str | None:
    """The stop reason of a result; None where the trial goes on."""
    stops = gate(trial_id, row)
    assert stops == ("stop_reason" in row)
    return row.get("stop_reason")


# --- first rung: what is missing or not finite ------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["epoch", "val_accuracy", "local_tpe"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, None, "0.7"])
def test_a_metric_that_is_not_a_finite_number_stops_as_nan(key: str, value: Any) -> None:
    assert verdict(LocalTPEGate(), result(**{key: value})) == "nan"


@pytest.mark.parametrize("key", ["epoch", "val_accuracy", "local_tpe"])
def test_a_missing_metric_stops_as_nan(key: str) -> None:
    row = result()
    del row[key]
    assert verdict(LocalTPEGate(), row) == "nan"


def test_an_empty_result_stops_as_nan() -> None:
    assert verdict(LocalTPEGate(), {}) == "nan"


def test_nan_stops_a_survivor_too_and_leaves_it_one() -> None:
    gate = LocalTPEGate()
    assert verdict(gate, result(1, 0.9, 0.7)) is None
    assert verdict(gate, result(2, NAN, NAN)) == "nan"
    assert gate.passed("t")


def test_nan_never_passes() -> None:
    gate = LocalTPEGate()
    gate("t", result(1, 0.9, NAN))
    gate("u", result(1, NAN, 0.7))
    assert not gate.passed("t")
    assert not gate.passed("u")


def test_numpys_numbers_are_numbers() -> None:
    import numpy as np

    gate = LocalTPEGate()
    assert verdict(gate, result(np.int64(1), np.float32(0.5), np.float32(0.3))) is None
    assert verdict(gate, result(np.int64(2), np.float32(0.9), np.float32(0.7))) is None
    assert gate.passed("t")
    assert verdict(gate, result(np.int64(3), np.float32("nan"), np.float32("nan"))) == "nan"


# --- second rung: survivors -------------------------------------------------------------------------------------------


def test_the_threshold_exactly_reached_passes() -> None:
    gate = LocalTPEGate(threshold=0.60)
    assert verdict(gate, result(40, 0.8, 0.60)) is None
    assert gate.passed("t")


def test_just_below_the_threshold_does_not_pass() -> None:
    gate = LocalTPEGate(threshold=0.60)
    assert verdict(gate, result(40, 0.8, math.nextafter(0.60, 0))) == "gate"
    assert not gate.passed("t")


def test_a_survivor_is_exempt_from_smoke_and_gate_whatever_comes_later() -> None:
    gate = LocalTPEGate()
    assert verdict(gate, result(3, 0.85, 0.61)) is None
    assert verdict(gate, result(10, 0.10, 0.07)) is None
    assert verdict(gate, result(40, 0.10, 0.07)) is None
    assert verdict(gate, result(99, 0.10, 0.07)) is None


def test_trials_are_judged_apart() -> None:
    gate = LocalTPEGate()
    gate("t", result(1, 0.9, 0.7))
    assert verdict(gate, result(40, 0.3, 0.2), "u") == "gate"
    assert (gate.passed("t"), gate.passed("u"), gate.passed("v")) == (True, False, False)


def test_the_best_that_the_trial_carries_makes_it_a_survivor_of_a_new_driver() -> None:
    gate = LocalTPEGate()
    assert verdict(gate, result(40, 0.5, 0.4, **{BEST_LOCAL_TPE: 0.60})) is None
    assert gate.passed("t")


@pytest.mark.parametrize("best", [NAN, None, 0.5999, -INF, "0.7"])
def test_a_best_below_the_threshold_or_unknown_does_not(best: Any) -> None:
    assert verdict(LocalTPEGate(), result(40, 0.5, 0.4, **{BEST_LOCAL_TPE: best})) == "gate"


# --- third rung: smoke ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accuracy", "expected"), [(0.45, "smoke"), (0.4499, "smoke"), (0.4501, None), (0.0, "smoke")])
def test_smoke_must_be_exceeded(accuracy: float, expected: str | None) -> None:
    assert verdict(LocalTPEGate(), result(10, accuracy, 0.3)) == expected


@pytest.mark.parametrize("epoch", [1, 9, 11, 39])
def test_smoke_counts_in_its_own_epoch_alone(epoch: int) -> None:
    assert verdict(LocalTPEGate(), result(epoch, 0.2, 0.15)) is None


def test_smoke_comes_before_gate_in_the_same_epoch() -> None:
    assert verdict(LocalTPEGate(max_epochs=10), result(10, 0.45, 0.3)) == "smoke"
    assert verdict(LocalTPEGate(max_epochs=10), result(10, 0.46, 0.3)) == "gate"


def test_smoke_beyond_the_last_epoch_never_applies() -> None:
    gate = LocalTPEGate(max_epochs=4)
    assert [verdict(gate, result(epoch, 0.2, 0.15)) for epoch in (1, 2, 3, 4)] == [None, None, None, "gate"]


# --- fourth rung: the last epoch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [40, 41, 1000])
def test_at_the_last_epoch_or_beyond_the_gate_closes(epoch: int) -> None:
    assert verdict(LocalTPEGate(), result(epoch, 0.6, 0.45)) == "gate"


def test_before_the_last_epoch_it_stays_open() -> None:
    assert verdict(LocalTPEGate(), result(39, 0.6, 0.45)) is None


@pytest.mark.parametrize(("lam", "needed"), [(20, "0.7933"), (22, "0.8170"), (24, "0.8388")])
def test_the_detail_says_which_accuracy_was_missing(lam: float, needed: str) -> None:
    row = result(40, 0.7, tpe_score(0.7, lam))
    assert verdict(LocalTPEGate(), row) == "gate"
    assert f"accuracy 0.7000 misses {needed} by" in row[STOP_DETAIL]
    assert row[STOP_DETAIL].endswith(f"by {0.6 * math.log10(1 + lam) - 0.7:.4f}")


def test_an_accuracy_of_zero_divides_nothing() -> None:
    row = result(40, 0.0, 0.0)
    assert verdict(LocalTPEGate(), row) == "gate"
    assert row[STOP_DETAIL] == "epoch 40: Local TPE 0.0000 < gate 0.6"


# --- as a Stopper -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1) | st.just(NAN), st.floats(0, 1) | st.just(NAN)), max_size=12)
)
def test_asking_twice_about_one_result_gives_the_same_answer(rows: list[tuple[int, float, float]]) -> None:
    """A function that simply returns has its last result judged twice."""
    once, twice = (LocalTPEGate(max_epochs=12, threshold=0.6) for _ in range(2))
    for row in rows:
        first, again = result(*row), result(*row)
        answer = once("t", first)
        assert twice("t", again) == answer
        assert twice("t", again) == answer
        assert twice("t", result(*row)) == answer
        assert (
            again == pytest.approx(first, nan_ok=True) if not answer else again["stop_reason"] == first["stop_reason"]
        )
    assert once.passed("t") == twice.passed("t")


@given(
    st.lists(st.tuples(st.floats(0, 1) | st.just(NAN), st.floats(0, 1) | st.just(NAN)), min_size=12, max_size=12),
    st.floats(0.01, 1),
)
def test_the_ladder_equals_the_spec_written_as_one_sentence_each(
    curve: list[tuple[float, float]], level: float
) -> None:
    gate = LocalTPEGate(threshold=level, smoke_epoch=5, smoke_accuracy=0.45, max_epochs=12)
    best = -INF
    for epoch, (accuracy, score) in enumerate(curve, start=1):
        if math.isnan(accuracy) or math.isnan(score):
            expected = "nan"
        elif (best := max(best, score)) >= level:
            expected = None
        elif epoch == 5 and accuracy <= 0.45:
            expected = "smoke"
        elif epoch == 12:
            expected = "gate"
        else:
            expected = None
        assert verdict(gate, result(epoch, accuracy, score)) == expected
        if expected is not None:
            break


def test_a_result_that_goes_on_is_left_as_it_is() -> None:
    row = result(5, 0.5, 0.4, more="x")
    before = copy.deepcopy(row)
    assert not LocalTPEGate()("t", row)
    assert row == before


def test_pickled_it_remembers_its_survivors_and_its_numbers() -> None:
    gate = LocalTPEGate(threshold=0.3, smoke_epoch=2, smoke_accuracy=0.2, max_epochs=3)
    gate("t", result(1, 0.5, 0.3))
    again = pickle.loads(pickle.dumps(gate))
    assert again.passed("t")
    assert verdict(again, result(3, 0.1, 0.1)) is None
    assert verdict(again, result(2, 0.2, 0.1), "u") == "smoke"
    assert verdict(again, result(3, 0.5, 0.29), "v") == "gate"


def test_it_never_stops_all() -> None:
    gate = LocalTPEGate()
    gate("t", result(40, 0.1, 0.1))
    gate("u", result(40, 0.9, 0.7))
    assert gate.stop_all() is False


def test_the_defaults_are_the_specs() -> None:
    gate = LocalTPEGate()
    assert (gate.threshold, gate.smoke_epoch, gate.smoke_accuracy, gate.max_epochs) == (0.60, 10, 0.45, 40)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", 0),
        ("threshold", 1.0001),
        ("threshold", 7),
        ("threshold", -0.6),
        ("threshold", NAN),
        ("smoke_epoch", 0),
        ("smoke_accuracy", -0.1),
        ("smoke_accuracy", 1.0001),
        ("smoke_accuracy", 45),
        ("smoke_accuracy", NAN),
        ("max_epochs", 0),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        LocalTPEGate(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", 1),
        ("threshold", 1e-9),
        ("smoke_epoch", 1),
        ("smoke_accuracy", 0),
        ("smoke_accuracy", 1),
        ("max_epochs", 1),
    ],
)
def test_a_value_at_the_end_of_its_range_is_allowed(name: str, value: Any) -> None:
    assert getattr(LocalTPEGate(**{name: value}), name) == value
