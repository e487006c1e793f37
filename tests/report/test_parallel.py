"""Parallel coordinates: every trial with a score on every axis, and colours to choose from."""

import dataclasses
from collections.abc import Callable
from typing import Any

from nkat_ray.record.run_folder import load_run
from nkat_ray.report.parallel import _axis, parallel
from nkat_ray.space import Choice, Span


def test_every_trial_with_a_score_has_a_point_on_every_axis(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run(fixed=["depth"]).folder)
    drawn = parallel(run)
    axes = list(drawn.layout.xaxis.ticktext)
    assert axes == [*run.searched, "lambda", "accuracy", "Local TPE"]
    assert "depth" not in axes
    assert len(drawn.data) == sum(row["best_local_tpe"] is not None for row in run.trials)
    assert all(len(trace.y) == len(axes) and 0 <= min(trace.y) <= max(trace.y) <= 1 for trace in drawn.data)
    assert "colour: Local TPE" in [button.label for button in drawn.layout.updatemenus[0].buttons]
    colours = drawn.layout.updatemenus[0].buttons[0].args[0]["line.color"]
    assert len(colours) == len(drawn.data)


def test_a_run_of_equal_trials_can_be_drawn(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run().folder)
    assert len(parallel(dataclasses.replace(run, trials=[run.trials[0], run.trials[0]])).data) == 2


def test_places_on_an_axis() -> None:
    assert _axis(Choice((None, 4, 8)), [8, None]) == ([1.0, 0.0], [(0.0, "off"), (0.5, "4"), (1.0, "8")])
    assert _axis(Span(1, 100, log=True), [1, 10, 100])[0] == [0.0, 0.5, 1.0]
    assert _axis(Span(0, 9), [3, 5, 4]) == ([0.0, 1.0, 0.5], [(0.0, "3"), (1.0, "5")])
    assert _axis(None, [2.0, 2.0]) == ([0.0, 0.0], [(0.0, "2")])
