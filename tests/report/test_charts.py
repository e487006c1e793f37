"""The figures' data: lanes, Pareto front, escaping, one legend entry a stop reason."""

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nkat_ray.files import STAGE2_FILE
from nkat_ray.report import charts, tables


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


def test_lanes_never_overlap_and_are_as_few_as_trials_at_once() -> None:
    rng = random.Random(3)
    spans = {
        n: (f"node{rng.randrange(2)}", start := rng.uniform(0, 100), start + rng.uniform(0, 30)) for n in range(60)
    }
    lanes = charts.pack_lanes(spans)
    for a, b in itertools.combinations(spans, 2):
        if lanes[a] == lanes[b]:
            assert spans[a][2] <= spans[b][1] + 1e-6 or spans[b][2] <= spans[a][1] + 1e-6
    for node in ("node0", "node1"):
        mine = [span for span in spans.values() if span[0] == node]
        at_once = max(sum(start <= span[1] < end for _, start, end in mine) for span in mine)
        assert len({lane for lane in lanes.values() if lane[0] == node}) == at_once
        assert all(lanes[trial][0] == spans[trial][0] for trial in spans)


def test_pareto_front_against_pairwise_comparison() -> None:
    rng = random.Random(5)
    points = [(float(rng.randrange(20, 28)), rng.randrange(30, 90) / 100) for _ in range(80)]
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    assert charts.pareto_front(points) == sorted(set(points) - beaten)


def test_learning_curves_name_each_stop_reason_once(make_run: Callable[..., Any]) -> None:
    run = make_run(repeat=2)
    figure = charts.learning_curves(run.trials, run.curves, gate=0.42, winner=0, searched=["depth", "conv_stem"])
    shown = [trace["name"] for trace in figure["data"] if trace.get("showlegend", True)]
    assert shown == ["finished", "asha", "smoke", "gate", "nan", "winner (trial 0)", "gate 0.42"]
    assert sum(len(trace["x"]) for trace in figure["data"][:-1]) == len(run.curves)
    assert figure["data"][-1]["y"] == [0.42, 0.42]


@pytest.mark.parametrize(("last", "step"), [(1, 1), (10, 1), (11, None)])
def test_few_epochs_are_labelled_one_by_one(make_run: Callable[..., Any], last: int, step: int | None) -> None:
    run = make_run()
    curves = [row for row in run.curves if row["epoch"] <= last]
    figure = charts.learning_curves(run.trials, curves, gate=0.42, winner=0, searched=["depth"])
    assert figure["layout"]["xaxis"].get("dtick") == step


def test_text_from_data_is_no_markup_to_plotly(make_run: Callable[..., Any]) -> None:
    run = make_run()
    for row in run.trials:
        row |= {"config/conv_stem": "<b>x</b>", "node": "<a href=x>", "stop_reason": row["stop_reason"]}
    figures = [
        charts.learning_curves(run.trials, run.curves, gate=0.42, winner=0, searched=["conv_stem"]),
        charts.timeline(run.trials, run.curves),
        charts.slice_of("<i>", [("<u>", 0.5, True)]),
    ]
    text = json.dumps(tables.plain(figures))
    assert not any(tag in text for tag in ("<a", "<i>", "<u>", "<b>x"))


def test_a_running_trial_ends_with_its_last_epoch(make_run: Callable[..., Any]) -> None:
    run = make_run(running=True)
    last = run.trials[-1]
    ends = [row["started_s"] + row["epoch_s"] for row in run.curves if row["trial"] == last["trial"]]
    expected = (last["node"], last["started_s"], pytest.approx(max(ends)))
    assert charts.trial_spans(run.trials, run.curves)[last["trial"]] == expected
    since_1970 = [row | {"started_s": row["started_s"] + 1.7e9} for row in run.curves]
    assert charts.trial_spans(run.trials, since_1970)[last["trial"]] == expected


def test_dataset_bars_leave_a_missing_dataset_empty(make_run: Callable[..., Any]) -> None:
    run = make_run(emnist=None)
    rows = {row["dataset"]: row for row in tables.read_stage2(run.folder / STAGE2_FILE) if row["trial"] == 0}
    figure = charts.dataset_bars(rows, score="tpe")
    bars = dict(zip(figure["data"][0]["y"], figure["data"][0]["x"], strict=True))
    assert bars["EMNIST letters"] is None
    assert bars["MNIST"] == rows["mnist"]["tpe"]
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["missing"]
