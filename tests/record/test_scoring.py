"""Aggregates, ranking, intervals and verdict against sums done by hand."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats

from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.record import scoring, tables

ALL = {"mnist": 0.99, "fashion_mnist": 0.90, "emnist_letters": 0.85, "cifar10": 0.70}
Rows = Callable[..., list[tables.Row]]


def test_scores_are_those_of_the_datasets_that_count(stage2_rows: Rows) -> None:
    rows = stage2_rows(0, 9, ALL)  # lambda 9: log10(10) = 1, so a TPE is its accuracy
    scores = scoring.result_scores(rows, 0)
    assert scores.global_tpe == pytest.approx(0.86)
    variance = (0.13**2 + 0.04**2 + 0.01**2 + 0.16**2) / 4
    assert scores.consistency == pytest.approx(1 - math.sqrt(variance))
    assert scores.robustness == 1.0
    assert scoring.validation_scores(rows, 0) == scores


def test_a_dataset_at_chance_or_missing_does_not_count(stage2_rows: Rows) -> None:
    rows = stage2_rows(0, 9, {**ALL, "cifar10": 0.10, "emnist_letters": None})
    assert scoring.datasets_counted(rows, 0) == 2
    assert scoring.result_scores(rows, 0).robustness == 0.5
    assert scoring.result_scores(rows, 0).global_tpe == pytest.approx((0.99 + 0.90) / 2)
    assert scoring.verdict_of({"winner": {"trial": 0}}, rows).status == "undecided"
    assert "only 2 of 4" in scoring.verdict_of({"winner": {"trial": 0}}, rows).sentence


def test_a_dataset_that_is_not_one_of_the_four_leaves_the_scores_alone(stage2_rows: Rows) -> None:
    rows = stage2_rows(0, 9, ALL)
    other = rows[0] | {"dataset": "mine", "tpe": 0.1}
    assert scoring.result_scores([*rows, other], 0) == scoring.result_scores(rows, 0)


def test_the_datasets_of_a_run_are_those_that_it_was_asked_to_cover() -> None:
    assert scoring.datasets_of({"data": {"leaves": {}, "cifar10": {}, "mnist": {}}}) == ["mnist", "cifar10", "leaves"]
    assert scoring.datasets_of({}) == ["mnist", "fashion_mnist", "emnist_letters", "cifar10"]
    assert [scoring.dataset_name(name) for name in ("cifar10", "leaves")] == ["CIFAR-10", "leaves"]


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({}, "not evaluated"),
        ({"status": "missing"}, "missing"),
        ({"status": "ok", "val_accuracy": 0.9}, "not tested"),
        ({"status": "ok", "val_accuracy": 0.9, "test_accuracy": 0.9}, "ok"),
        ({"status": "failed", "error": "a worker died"}, "failed"),
        ({"status": "failed", "val_accuracy": 0.1}, "at chance"),
        ({"status": "failed", "val_accuracy": 0.2, "test_accuracy": 0.1}, "at chance"),
        ({"status": "failed", "val_accuracy": 0.1, "test_accuracy": 0.2}, "at chance"),
        ({"status": "failed", "val_accuracy": 0.9, "error": "a worker died"}, "failed"),  # while it was tested
    ],
)
def test_at_chance_is_distinguished_from_a_failure(row: dict[str, Any], status: str) -> None:
    assert scoring.stage2_status({"classes": 10, **row} if row else row) == status


def test_rank_orders_by_count_then_score_then_lambda_then_number(stage2_rows: Rows) -> None:
    rows = [
        *stage2_rows(4, 9, ALL),
        *stage2_rows(3, 9, ALL),
        *stage2_rows(2, 9, ALL),
        *stage2_rows(1, 9, {**ALL, "cifar10": 0.71}),
        *stage2_rows(0, 9, {**ALL, "emnist_letters": None}),  # a higher mean, but of three
        *stage2_rows(5, 9, dict.fromkeys(ALL)),
    ]
    lambdas = {0: 20.0, 1: 24.0, 2: 22.0, 3: 20.0, 4: 20.0, 5: 20.0}
    assert scoring.rank(rows, lambdas) == [1, 3, 4, 2, 0, 5]
    random.Random(0).shuffle(rows)
    assert scoring.rank(rows, lambdas) == [1, 3, 4, 2, 0, 5]


def test_rank_never_reads_test_figures(stage2_rows: Rows) -> None:
    rows = [*stage2_rows(0, 20, ALL), *stage2_rows(1, 20, {**ALL, "cifar10": 0.71})]
    before = scoring.rank(rows, {0: 20.0, 1: 20.0})
    for row in rows:
        if row["trial"] == 1:
            row |= {"test_accuracy": 0.01, "tpe": 0.001, "status": "failed"}
    assert scoring.rank(rows, {0: 20.0, 1: 20.0}) == before == [1, 0]
    for row in rows:
        for key in ("test_accuracy", "tpe", "ci_low", "ci_high", "n_test"):
            row[key] = None
    assert scoring.rank(rows, {0: 20.0, 1: 20.0}) == before


def test_interval_of_one_dataset_is_its_own_wilson_interval(stage2_rows: Rows) -> None:
    rows = stage2_rows(0, 9, {**dict.fromkeys(ALL), "cifar10": 0.70})
    row = scoring.of_trial(rows, 0)["cifar10"]
    assert scoring.global_interval(rows, 0) == pytest.approx((row["ci_low"], row["ci_high"]))


def test_interval_covers_the_truth_in_about_95_of_100_draws(stage2_rows: Rows) -> None:
    rng = random.Random(1)
    n, draws = 200, 400
    truth = sum(ALL.values()) / 4
    hits = 0
    for _ in range(draws):
        drawn = {name: sum(rng.random() < p for _ in range(n)) / n for name, p in ALL.items()}
        low, high = scoring.global_interval(stage2_rows(0, 9, drawn, n_test=n), 0) or (1, 0)
        hits += low <= truth <= high
    assert 0.92 <= hits / draws <= 0.98


@pytest.mark.parametrize(
    ("accuracies", "status"),
    [
        ((0.80, 0.75, 0.70, 0.75), "reached"),
        ((0.70, 0.70, 0.70, 0.70), "undecided"),  # the interval holds 0.70
        ((0.60, 0.60, 0.60, 0.60), "not reached"),
        ((0.99, 0.99, 0.99, 0.20), "not reached"),  # Consistency 0.66
    ],
)
def test_verdict(accuracies: tuple[float, ...], status: str, stage2_rows: Rows) -> None:
    rows = stage2_rows(0, 9, dict(zip(ALL, accuracies, strict=True)))
    found = scoring.verdict_of({"winner": {"trial": 0}}, rows)
    assert found.status == status
    assert found.sentence.lower().startswith(status)


def test_verdict_without_a_winner() -> None:
    ended = {"winner": None, "exit_code": 3}
    assert scoring.verdict_of(ended, []).status == "not reached"
    assert scoring.verdict_of(ended | {"exit_code": None}, []).status == "undecided"
    assert scoring.verdict_of(ended | {"survivors": [0, 1]}, []).status == "undecided"


@pytest.mark.parametrize(
    ("code", "status"), [(None, "undecided"), (1, "undecided"), (130, "undecided"), (3, "not reached")]
)
def test_a_run_that_resume_would_continue_is_undecided(code: int | None, status: str) -> None:
    assert scoring.verdict_of({"winner": None, "gate": 0.6, "exit_code": code}, []).status == status


def test_scorecard_is_the_table_of_the_notes(stage2_rows: Rows) -> None:
    lines = {line.metric: line for line in scoring.scorecard(stage2_rows(0, 9, ALL), 0)}
    assert [line.before for line in lines.values()] == [0.53, 0.84, 1.00]
    assert lines["global_tpe"].gap == pytest.approx(0.16)
    assert lines["global_tpe"].state == "met"
    assert {line.state for line in scoring.scorecard([], None)} == {"open"}


def test_with_fewer_than_four_datasets_nothing_is_met(stage2_rows: Rows) -> None:
    lines = scoring.scorecard(stage2_rows(0, 9, {**ALL, "cifar10": None}), 0)
    assert lines[0].gap > 0
    assert {line.state for line in lines} == {"open"}


def test_nearest_miss_says_what_the_gate_asks_for() -> None:
    rows = [
        {"trial": 0, "best_local_tpe": 0.55, "best_val_accuracy": 0.75, "lambda_theory": 22.0},
        {"trial": 1, "best_local_tpe": None, "best_val_accuracy": None, "lambda_theory": 20.0},
        {"trial": 2, "best_local_tpe": 0.55, "best_val_accuracy": 0.75, "lambda_theory": 22.0},
    ]
    miss = scoring.nearest_miss(rows, 0.60)
    assert miss is not None
    assert miss.trial == 0
    assert miss.needed == pytest.approx(0.817, abs=5e-4)  # docs/spec.md section 2
    assert scoring.nearest_miss([rows[1]], 0.60) is None


def test_notices_name_synthetic_data_and_another_gate() -> None:
    real = {"gate": 0.60, "preset": "round2", "data": {"mnist": {"source": "/data"}}}
    assert scoring.notices(real) == []
    assert scoring.notices(real | {"gate": 0.29, "preset": "quick"}) == [
        "gate 0.29 (preset quick; the notes' gate is 0.60)"
    ]
    generated = {"mnist": {"source": "/data"}, "emnist_letters": {"source": "synthetic suite 1"}}
    assert "SYNTHETIC DATA: EMNIST letters generated" in scoring.notices(real | {"data": generated})[0]
    assert "SYNTHETIC DATA: all datasets" in scoring.notices(real | {"data": {"mnist": {"source": "synthetic"}}})[0]
    assert scoring.notices(real | {"data": {"mnist": {"source": None, "missing": "not found"}}}) == []


def test_generated_images_cannot_reach_the_target(stage2_rows: Rows) -> None:
    rows = stage2_rows(0, 9, {"mnist": 0.80, "fashion_mnist": 0.75, "emnist_letters": 0.70, "cifar10": 0.75})
    summary = {"winner": {"trial": 0}, "gate": 0.6, "exit_code": 0, "data": {"mnist": {"source": "/data"}}}
    assert scoring.verdict_of(summary, rows).status == "reached"
    found = scoring.verdict_of(summary | {"data": {"mnist": {"source": "synthetic suite 1"}}}, rows)
    assert found.status == "undecided"
    assert "generated MNIST" in found.sentence


# --- what Optuna is told ----------------------------------------------------------------------------------------------


def told(**datasets: tuple[str, float | None, float | None]) -> float:
    """`feedback_score` of trial 1, with (status, val_accuracy, val_tpe) of each dataset; trial 2 lies beside it."""
    rows = [
        {"trial": 1, "dataset": name, "classes": 10, "status": status, "val_accuracy": accuracy, "val_tpe": tpe}
        for name, (status, accuracy, tpe) in datasets.items()
    ]
    rows += [{**row, "trial": 2, "val_tpe": 0.99, "val_accuracy": 0.9} for row in rows]
    return scoring.feedback_score(rows, 1)


def test_optuna_receives_the_mean_over_the_datasets() -> None:
    four = {name: ("ok", 0.5, tpe) for name, tpe in zip(STAGE2_DATASETS, (0.1, 0.2, 0.3, 0.8), strict=True)}
    assert told(**four) == pytest.approx(0.35)
    missing = {**four, "mnist": ("missing", None, None)}
    assert told(**missing) == pytest.approx((0.2 + 0.3 + 0.8) / 3)
    at_chance = {**four, "cifar10": ("failed", 0.1, None)}
    assert told(**at_chance) == pytest.approx((0.1 + 0.2 + 0.3) / 4)
    assert math.isnan(told(**{**four, "mnist": ("failed", None, None)}))  # a worker died
    assert math.isnan(told(mnist=("failed", 0.1, None)))
    assert math.isnan(told(mnist=("missing", None, None)))
    assert math.isnan(told())


# --- the official recalculation ---------------------------------------------------------------------------------------


def seeds_of(stage2_rows: Rows, means: list[float], spread: float = 0.0) -> list[tables.Row]:
    """A seed a mean: one accuracy lies far below it, three a `spread` above; lambda 9: a TPE is its accuracy."""
    steps = (1, 1, 1, -3)
    return [
        row
        for seed, mean in enumerate(means)
        for row in stage2_rows(seed, 9, {name: mean + spread * step for name, step in zip(ALL, steps, strict=True)})
    ]


def test_the_officials_interval_is_students_t_and_the_test_images_in_quadrature(stage2_rows: Rows) -> None:
    means = [0.80, 0.82, 0.87]
    found = scoring.official(seeds_of(stage2_rows, means), [0, 1, 2])
    assert found.global_tpe == pytest.approx(sum(means) / 3)
    spread = scipy.stats.t(2).ppf(0.975) * scipy.stats.sem(means)
    bounds = [scoring.global_interval(seeds_of(stage2_rows, means), seed) for seed in range(3)]
    below = sum(mean - low for mean, (low, _) in zip(means, bounds, strict=True)) / 3
    above = sum(high - mean for mean, (_, high) in zip(means, bounds, strict=True)) / 3
    expected = (found.global_tpe - math.hypot(spread, below), found.global_tpe + math.hypot(spread, above))
    assert found.interval == pytest.approx(expected)


@pytest.mark.parametrize(
    ("means", "spread", "status", "word"),
    [
        ([0.80, 0.81, 0.80], 0.0, "reached", "over 3 seeds"),
        ([0.60, 0.61, 0.60], 0.0, "not reached", "below the target"),
        ([0.60, 0.75, 0.80], 0.0, "undecided", "not distinct"),
        ([0.80], 0.0, "undecided", "not distinct"),  # one seed says nothing of the spread
        ([0.80, 0.81, 0.80], 0.13, "not reached", "Consistency"),
    ],
)
def test_official_verdict(stage2_rows: Rows, means: list[float], spread: float, status: str, word: str) -> None:
    rows = seeds_of(stage2_rows, means, spread)
    verdict = scoring.official(rows, list(range(len(means)))).verdict
    assert verdict.status == status
    assert word in verdict.sentence


def test_a_seed_that_lost_a_dataset_leaves_the_official_verdict_open(stage2_rows: Rows) -> None:
    rows = [*stage2_rows(0, 9, ALL), *stage2_rows(1, 9, {**ALL, "cifar10": None})]
    found = scoring.official(rows, [0, 1])
    assert found.verdict.status == "undecided"
    assert "only 3 of 4" in found.verdict.sentence
    assert found.robustness == pytest.approx(0.875)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3600, "1:00:00"), (-1, "0:00")])
def test_duration(seconds: float, text: str) -> None:
    assert scoring.duration(seconds) == text


# --- --quiet and --json -----------------------------------------------------------------------------------------------


def test_a_stage2_without_a_result_is_named_as_what_it_is() -> None:
    found = scoring.verdict_of({"winner": None, "gate": 0.6, "exit_code": 1, "survivors": [1, 4]}, [])
    assert (found.status, "2 passed the gate, but Stage 2 has no result" in found.sentence) == ("undecided", True)
