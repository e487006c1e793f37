"""The figures' data: Pareto front, datasets, one legend entry per stop reason."""

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nkat_ray.files import STAGE2_FILE
from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.record import tables
from nkat_ray.record.run_folder import load_run
from nkat_ray.report import charts
from nkat_ray.report.advice import Loss


def test_every_stop_reason_has_a_colour_and_a_mark() -> None:
    assert set(charts.COLOURS) == set(charts.SYMBOLS) == {*tables.STOP_REASONS, charts.RUNNING}


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
COLOUR_BLIND = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


def seen(colour: str, matrix: Any) -> np.ndarray:
    """A colour as such an eye sees it, in CIELAB (D65)."""
    code = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    linear = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    ratio = np.array(TO_XYZ) @ (np.array(matrix) @ linear).clip(0, 1) / np.array([0.95047, 1, 1.08883])
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("matrix", COLOUR_BLIND.values(), ids=COLOUR_BLIND.keys())
def test_colour_blind_readers_tell_the_stop_reasons_apart(matrix: Any) -> None:
    reasons = [reason for reason in charts.COLOURS if reason != charts.RUNNING]  # `running` is grey as `budget` is
    for a, b in itertools.combinations(reasons, 2):
        distance = np.linalg.norm(seen(charts.COLOURS[a], matrix) - seen(charts.COLOURS[b], matrix))
        assert distance > 12, (a, b)  # 2.3 is just noticeable
    assert len(set(charts.SYMBOLS.values())) == len(charts.SYMBOLS)  # and the marks differ


def test_pareto_front_against_pairwise_comparison() -> None:
    rng = random.Random(5)
    points = [(float(rng.randrange(20, 28)), rng.randrange(30, 90) / 100) for _ in range(80)]
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    assert charts.pareto_front(points) == sorted(set(points) - beaten)


@pytest.mark.parametrize("seed", range(20))
def test_the_line_of_the_front_runs_through_no_trial_that_is_beaten(seed: int) -> None:
    rng = random.Random(seed)
    trials = [
        {"trial": n, "stop_reason": "finished", "lambda_theory": rng.choice([20.0, 22.0, 24.0, 26.4]),
         "best_val_accuracy": rng.randrange(30, 50) / 100}
        for n in range(30)
    ]  # fmt: skip
    line = next(trace for trace in charts.pareto(trials, 0.3).data if trace.name == "Pareto front")
    assert line.line.shape in (None, "linear")
    front = list(zip(line.x, line.y, strict=True))
    for row in trials:
        x, y = row["lambda_theory"], row["best_val_accuracy"]
        for (x1, y1), (x2, y2) in itertools.pairwise(front):
            on_line = x1 <= x <= x2 and abs((y - y1) * (x2 - x1) - (y2 - y1) * (x - x1)) < 1e-9
            assert not on_line or (x, y) in front


def test_learning_curves_name_each_stop_reason_once(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run(repeat=2).folder)
    traces = charts.learning_curves(run).data
    shown = [trace.name for trace in traces if trace.showlegend is not False]
    assert shown == ["finished", "asha", "smoke", "gate", "nan", "winner (trial 0)", "gate 0.42"]
    assert sum(len(trace.x) for trace in traces[:-1]) == len(run.curves)
    assert traces[-1].y == (0.42, 0.42)


@pytest.mark.parametrize(("last", "step"), [(1, 1), (10, 1), (11, None)])
def test_few_epochs_are_labelled_one_by_one(make_run: Callable[..., Any], last: int, step: int | None) -> None:
    run = load_run(make_run().folder)
    run = dataclasses.replace(run, curves=[row for row in run.curves if row["epoch"] <= last])
    assert charts.learning_curves(run).layout.xaxis.dtick == step


def test_dataset_bars_leave_a_missing_dataset_empty(make_run: Callable[..., Any]) -> None:
    run = make_run(emnist=None)
    rows = {row["dataset"]: row for row in tables.read_rows(run.folder / STAGE2_FILE) if row["trial"] == 0}
    measured, targets = charts.dataset_bars({"one": rows}, STAGE2_DATASETS, score="tpe").data
    bars = dict(zip(measured.y, measured.x, strict=True))
    assert bars["EMNIST letters (missing)"] is None
    assert bars["MNIST"] == rows["mnist"]["tpe"]
    assert dict(zip(targets.y, targets.x, strict=True))["MNIST"] == 0.69


def test_dataset_bars_show_what_was_asked_for_and_nothing_else(make_run: Callable[..., Any]) -> None:
    rows = {row["dataset"]: row for row in make_run().stage2 if row["trial"] == 0}
    rows["mine"] = {**rows["mnist"], "status": "failed", "classes": 2, "test_accuracy": 0.41, "tpe": 0.3}
    measured, targets = charts.dataset_bars({"one": rows}, ["cifar10", "mine"], score="test_accuracy").data
    assert measured.y == ("mine (at chance)", "CIFAR-10")
    assert measured.text[0] == "0.410"
    assert targets.x == (None, 0.6)  # the notes name no target for it


def test_dataset_bars_of_several_runs_stand_side_by_side(make_run: Callable[..., Any]) -> None:
    rows = {row["dataset"]: row for row in make_run().stage2 if row["trial"] == 0}
    *bars, _ = charts.dataset_bars({"a": rows, "b": {}}, STAGE2_DATASETS, score="test_accuracy").data
    assert [trace.name for trace in bars] == ["a", "b"]
    assert bars[0].y == bars[1].y == ("CIFAR-10", "EMNIST letters", "Fashion-MNIST", "MNIST")
    assert bars[1].x == (None,) * 4
    low, high = bars[0].error_x.arrayminus[0], bars[0].error_x.array[0]
    assert (bars[0].x[0] - low, bars[0].x[0] + high) == pytest.approx(
        (rows["cifar10"]["ci_low"], rows["cifar10"]["ci_high"])
    )


def test_the_waterfall_ends_at_the_score_and_shows_the_target() -> None:
    drawn = charts.waterfall([Loss("lambda", 0.02), Loss("errors on MNIST", 0.03)], 0.65, 0.70)
    bars, line = drawn.data
    assert list(bars.x) == pytest.approx([0.70, -0.02, -0.03, 0.65])
    assert list(bars.measure) == ["absolute", "relative", "relative", "total"]
    assert list(bars.y) == ["without an error 0.700", "lambda -0.020", "MNIST -0.030", "now 0.650"]
    assert list(line.x) == [0.70, 0.70]
