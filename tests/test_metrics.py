import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nkat_ray.metrics import (
    ACCURACY_TARGETS,
    BEFORE,
    BEFORE_ACCURACY,
    NOTES_LAMBDA,
    STAGE2_DATASETS,
    TPE_TARGETS,
    accuracy_for,
    counts,
    lambda_notes,
    lambda_theory,
    stage2_scores,
    tpe_score,
    wilson_interval,
)

LAMBDAS = st.floats(1e-6, 1e9)
ACCURACIES = st.floats(0, 1)
SIZES = {"conv_stem": "tiny", "embed_dim": 384, "nkat_parameters": 28, "parameters": 12_600_000}


# --- tpe_score --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "lam", "expected"),
    [
        (0.5, 9, 0.5),  # log10(10) = 1
        (1.0, 99, 0.5),
        (0.0, 20, 0.0),
        (1.0, 20, 0.7563042),  # 1 / log10(21): the most that lambda 20 allows
        (0.6, 20, 0.4537825),
    ],
)
def test_tpe_score_against_closed_forms(accuracy: float, lam: float, expected: float) -> None:
    assert tpe_score(accuracy, lam) == pytest.approx(expected, abs=1e-7)


@given(ACCURACIES, LAMBDAS)
def test_tpe_score_is_accuracy_over_the_decimal_logarithm(accuracy: float, lam: float) -> None:
    assert tpe_score(accuracy, lam) == pytest.approx(accuracy / (np.log1p(lam) / np.log(10)), rel=1e-6)


@pytest.mark.parametrize("lam", [0, -1, -1e-9, math.nan, math.inf, -math.inf])
def test_tpe_score_refuses_lambda(lam: float) -> None:
    with pytest.raises(ValueError, match="lambda_theory"):
        tpe_score(0.5, lam)


@pytest.mark.parametrize("accuracy", [-1e-9, 1.0000001, 79.3, math.nan, math.inf, -math.inf])
def test_tpe_score_refuses_accuracy(accuracy: float) -> None:
    with pytest.raises(ValueError, match="accuracy"):
        tpe_score(accuracy, 20)


@pytest.mark.parametrize(("lam", "expected"), [(20, 0.793), (22, 0.817), (24, 0.839)])
def test_accuracy_that_the_gate_asks_for(lam: float, expected: float) -> None:
    assert round(accuracy_for(0.60, lam), 3) == expected


@pytest.mark.parametrize(("lam", "expected"), [(20, 0.926), (22, 0.953), (24, 0.979)])
def test_mean_accuracy_that_global_tpe_070_asks_for(lam: float, expected: float) -> None:
    assert round(accuracy_for(0.70, lam), 3) == expected


@given(ACCURACIES, LAMBDAS)
def test_accuracy_for_is_the_inverse_of_tpe_score(accuracy: float, lam: float) -> None:
    assert accuracy_for(tpe_score(accuracy, lam), lam) == pytest.approx(accuracy, abs=1e-12)


# --- lambda -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "width", "expected"),
    [
        ("off", 384, 20.0),
        ("tiny", 384, 22.0),
        ("small", 384, 24.0),
        ("off", 3840, 40.0),  # ten times the width: log10 adds 1
        ("tiny", 512, 24.74866),
        ("off", 448, 21.33894),
    ],
)
def test_lambda_notes_against_closed_forms(stem: str, width: int, expected: float) -> None:
    assert lambda_notes(stem, width) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("width", [1, 16, 96, 383, 384])
def test_a_small_model_does_not_buy_its_way_through_the_gate(width: int) -> None:
    assert lambda_notes("off", width) == 20.0


@pytest.mark.parametrize(("stem", "width"), [("big", 384), ("", 384), ("tiny", 0), ("off", -384)])
def test_lambda_notes_refuses(stem: str, width: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        lambda_notes(stem, width)


@pytest.mark.parametrize(("model", "expected"), [("notes", 22.0), ("counted", 28.0), ("millions", 12.6)])
def test_lambda_theory_models(model: str, expected: float) -> None:
    assert lambda_theory(model, **SIZES) == pytest.approx(expected)


def test_lambda_theory_refuses_an_unknown_model() -> None:
    with pytest.raises(ValueError, match="'optuna'; it must be one of notes, counted, millions"):
        lambda_theory("optuna", **SIZES)


# --- Stage 2's aggregates ---------------------------------------------------------------------------------------------


def test_the_notes_targets_give_0592_and_not_072() -> None:
    local = {name: tpe_score(accuracy, 20) for name, accuracy in ACCURACY_TARGETS.items()}
    assert round(stage2_scores(local).global_tpe, 3) == 0.592
    local = {name: tpe_score(accuracy, 11.2) for name, accuracy in ACCURACY_TARGETS.items()}
    assert round(stage2_scores(local).global_tpe, 2) == 0.72


def test_only_two_of_the_notes_tpe_targets_follow_from_their_accuracies() -> None:
    follows = {name: abs(tpe_score(a, 20) - TPE_TARGETS[name]) < 0.005 for name, a in ACCURACY_TARGETS.items()}
    assert follows == {"mnist": True, "fashion_mnist": False, "emnist_letters": False, "cifar10": True}


def test_consistency_is_the_population_deviation() -> None:
    """Four scores with mean 0.53 whose population deviation is 0.16: the notes' 0.84; the sample's would give 0.815."""
    scores = stage2_scores(dict(zip(STAGE2_DATASETS, (0.69, 0.69, 0.37, 0.37), strict=True)))
    assert scores.global_tpe == pytest.approx(0.53)
    assert scores.consistency == pytest.approx(0.84)
    assert scores.robustness == 1.0


def test_the_published_accuracies_give_the_notes_figures() -> None:
    """The accuracies behind the figures before Round-2; the published file says 0.52752, 0.83546 and 1.0."""
    scores = stage2_scores({name: tpe_score(a, NOTES_LAMBDA) for name, a in BEFORE_ACCURACY.items()})
    assert scores.global_tpe == pytest.approx(0.52752, abs=5e-6)
    assert scores.consistency == pytest.approx(0.83546, abs=5e-6)
    assert {name: round(getattr(scores, name), 2) for name in BEFORE} == BEFORE


@given(st.lists(st.none() | st.floats(0, 4), min_size=1, max_size=4))
def test_stage2_scores_equal_numpys(values: list[float | None]) -> None:
    scores = stage2_scores(dict(zip(STAGE2_DATASETS, values, strict=False)))
    known = [value for value in values if value is not None]
    assert scores.robustness == len(known) / len(values)
    if known:
        assert scores.global_tpe == pytest.approx(np.mean(known))
        assert scores.consistency == pytest.approx(1 - np.std(known))


def test_one_dataset_that_counts() -> None:
    scores = stage2_scores({"mnist": 0.7, "fashion_mnist": None, "emnist_letters": None, "cifar10": None})
    assert (scores.global_tpe, scores.consistency, scores.robustness) == (0.7, 1.0, 0.25)


def test_none_that_counts_gives_nan_nan_and_zero() -> None:
    scores = stage2_scores(dict.fromkeys(STAGE2_DATASETS))
    assert math.isnan(scores.global_tpe)
    assert math.isnan(scores.consistency)
    assert scores.robustness == 0.0


def test_a_score_of_zero_counts() -> None:
    assert stage2_scores({"mnist": 0.0, "cifar10": None}).robustness == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        stage2_scores({"mnist": 0.7, "cifar10": bad})


def test_no_dataset_is_refused() -> None:
    said = "no dataset given; pass every Stage 2 dataset, None where it does not count"
    with pytest.raises(ValueError, match=f"^{said}$"):
        stage2_scores({})


@pytest.mark.parametrize(
    ("accuracy", "classes", "expected"),
    [
        (0.1, 10, False),  # at chance
        (0.1001, 10, True),
        (1 / 26, 26, False),
        (0.0, 10, False),
        (1.0, 10, True),
        (None, 10, False),
        (math.nan, 10, False),
    ],
)
def test_a_dataset_counts_above_chance(accuracy: float | None, classes: int, expected: bool) -> None:
    assert counts(accuracy, classes) is expected


# --- Wilson -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, table I (method 3), to four places
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10**9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(case: tuple[int, int]) -> None:
    """Each bound is a proportion p from which the observation is exactly z standard errors (of p) away."""
    successes, n = case
    z = statistics.NormalDist().inv_cdf(0.975)
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    for p in (low, high):
        assert (successes / n - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, abs=1e-9)


def test_wilson_is_exact_at_the_ends_and_symmetric() -> None:
    assert wilson_interval(0, 10_000)[0] == 0.0
    assert wilson_interval(10_000, 10_000)[1] == 1.0
    low, high = wilson_interval(30, 100)
    assert wilson_interval(70, 100) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 10), (11, 10), (5, -10)])
def test_wilson_refuses(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


def test_millions_are_exact_and_an_unknown_stem_names_the_three() -> None:
    counted = dict(conv_stem="off", embed_dim=384, nkat_parameters=28, parameters=2_500_000)
    assert lambda_theory("millions", **counted) == 2.5  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"it must be one of off, tiny, small$"):
        lambda_notes("big", 384)
    with pytest.raises(ValueError, match=r"it must be one of notes, counted, millions$"):
        lambda_theory("optuna", **counted)  # type: ignore[arg-type]
