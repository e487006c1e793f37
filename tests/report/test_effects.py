"""What mattered: all trials at equal epochs, against a variance that is known by hand and by scipy."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats

from nkat_ray.report.effects import LEAST_TRIALS, compare_trials, equal_epoch, explained, grouped
from nkat_ray.report.html import write_report


def test_the_epoch_is_the_latest_that_nearly_all_trials_have() -> None:
    curves = [
        {"trial": trial, "epoch": epoch, "local_tpe": trial + epoch / 10}
        for trial in range(10)
        for epoch in range(1, 10 if trial < 3 else 4)  # three go on, seven are stopped after epoch 3
    ]
    curves += [{"trial": 10, "epoch": 1, "local_tpe": 0.0}, {"trial": 10, "epoch": 2, "local_tpe": math.nan}]
    epoch, scores = equal_epoch(curves)
    assert epoch == 3
    assert scores == {trial: trial + 0.3 for trial in range(10)}
    assert equal_epoch([]) == (0, {})


def test_nothing_is_compared_below_twenty_trials(make_run: Callable[..., Any]) -> None:
    run = make_run(repeat=2)
    assert len(run.trials) < LEAST_TRIALS
    assert compare_trials(run.trials, run.curves, ["depth"]) is None
    page = write_report(run.folder).read_text(encoding="utf-8")
    assert "explains" not in page


def test_trials_that_were_stopped_early_count_like_the_others(make_run: Callable[..., Any]) -> None:
    run = make_run(repeat=4)
    found = compare_trials(run.trials, run.curves, ["depth", "conv_stem", "lr"])
    assert found is not None
    assert found.epoch == 3  # ASHA stops the earliest after three
    stopped = {row["trial"] for row in run.trials if row["stop_reason"] == "asha"}
    assert stopped <= set(found.scores)
    assert {effect.name for effect in found.effects} == {"depth", "conv_stem"}  # lr did not vary
    assert [effect.share for effect in found.effects] == sorted((e.share for e in found.effects), reverse=True)
    page = write_report(run.folder).read_text(encoding="utf-8")
    assert f"n = {len(found.scores)} trials" in page


def test_the_share_is_epsilon_squared_and_its_interval_that_of_the_noncentral_f() -> None:
    draw = random.Random(0)
    groups = [[mean + draw.gauss(0, 1) for _ in range(12)] for mean in (0.0, 0.5, 2.0)]
    ratio = scipy.stats.f_oneway(*groups).statistic
    share, low, high = explained(groups)
    assert share == pytest.approx((ratio - 1) * 2 / (ratio * 2 + 33))
    for bound, level in ((low, 0.975), (high, 0.025)):
        ncp = bound * 36 / (1 - bound)
        assert scipy.stats.ncf.cdf(ratio, 2, 33, ncp) == pytest.approx(level, abs=1e-4)


def test_noise_explains_nothing_and_a_step_everything() -> None:
    draw = random.Random(1)
    shares = [explained([[draw.gauss(0, 1) for _ in range(10)] for _ in range(3)]) for _ in range(200)]
    assert sum(low == 0 for _, low, _ in shares) >= 0.95 * len(shares)
    assert sum(share for share, _, _ in shares) / len(shares) < 0.05
    assert explained([[1.0, 1.0], [2.0, 2.0]]) == (1.0, 1.0, 1.0)
    assert explained([[1.0, 1.0], [1.0, 1.0]])[0] == 0.0


def test_many_values_are_cut_into_thirds_and_off_comes_first() -> None:
    points = [(value, value) for value in (None, *range(11))]
    groups = grouped([(value, -1.0 if value is None else float(value)) for value, _ in points])
    assert [len(group) for group in groups] == [4, 4, 4]
    assert groups[0] == [-1.0, 0.0, 1.0, 2.0]
    assert [sorted(group) for group in grouped([("a", 1.0), ("b", 2.0), ("a", 3.0)])] == [[1.0, 3.0], [2.0]]
