"""Importances and points of the study in a journal, against Optuna's own."""

from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution

from nkat_ray.files import STUDY_FILE
from nkat_ray.report.study import load_study, study_importances


def test_importances_and_slices_are_optunas_own(make_run: Callable[..., Any]) -> None:
    study = load_study(make_run(repeat=4, journal=True).folder / STUDY_FILE)
    values, complete, points = study_importances(study)
    assert values == optuna.importance.get_param_importances(study)
    assert sum(values.values()) == pytest.approx(1)
    assert complete == 20
    plot = optuna.visualization.plot_slice(study)
    assert len(plot.data) == len(points)
    for n, trace in enumerate(plot.data, 1):
        name = plot.layout[f"xaxis{n if n > 1 else ''}"].title.text
        drawn = sorted((str(value), score) for value, score, done in points[name] if done)
        assert drawn == sorted((str(x).strip("'"), y) for x, y in zip(trace.x, trace.y, strict=True))


def test_a_study_of_two_objectives_shows_the_first_and_an_earlier_runs_trials_are_no_points() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(12):
        trial = study.ask({"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)})
        if number < 2:
            trial.set_user_attr("warm_start", f"round1/{number}")
        if number == 11:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, [trial.params["x"], 20.0 + trial.params["y"]])
    values, complete, points = study_importances(study)
    assert set(values) == {"x", "y"}
    assert complete == 9
    assert points["x"] == [(t.params["x"], t.values[0], True) for t in study.trials[2:11]]
