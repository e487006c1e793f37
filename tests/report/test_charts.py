"""The figures' data: lanes, Pareto front, escaping, one legend entry a stop reason."""

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from nkat_ray.report import charts, tables


def test_every_stop_reason_has_a_colour_and_a_mark() -> None:
    assert set(charts.COLOURS) == set(charts.SYMBOLS) == {*tables.STOP_REASONS, charts.RUNNING}


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
    rows = {row["dataset"]: row for row in tables.read_stage2(run.folder / tables.STAGE2_FILE) if row["trial"] == 0}
    figure = charts.dataset_bars(rows, score="tpe")
    bars = dict(zip(figure["data"][0]["y"], figure["data"][0]["x"], strict=True))
    assert bars["EMNIST letters"] is None
    assert bars["MNIST"] == rows["mnist"]["tpe"]
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["missing"]
