import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nkat_ray.search.stops import Stop, TrialStopper, at_last_epoch, is_finite, leave_on_trial, out_of_time, stop_of


@pytest.mark.parametrize(
    ("best", "reason", "detail"),
    [
        (0.6, "finished", "epoch 4: Local TPE 0.6000 >= gate 0.6"),
        (0.5999, "gate", "epoch 4: Local TPE 0.5999 < gate 0.6"),
        (-math.inf, "gate", "epoch 4: Local TPE -inf < gate 0.6"),
    ],
)
def test_the_last_epoch_ends_a_survivor_and_any_other_trial(best: float, reason: str, detail: str) -> None:
    assert at_last_epoch(4, best, 0.6) == Stop(reason, detail)


def test_a_reason_is_a_part_of_the_result() -> None:
    assert out_of_time(3).columns() == {
        "stop_reason": "budget", "stop_detail": "epoch 3: Stage 1's time is up"
    }  # fmt: skip


def test_the_result_states_the_reason_else_the_trial_does() -> None:
    trial: Any = SimpleNamespace()
    assert stop_of(trial, {}) is None
    leave_on_trial(trial, Stop("asha", "why"))
    assert stop_of(trial, {"stop_reason": None}) == ("asha", "why")
    assert stop_of(trial, {"stop_reason": "nan"}) == ("nan", None)


@pytest.mark.parametrize(
    ("value", "finite"),
    [
        (0.5, True),
        (1, True),
        (np.float32(0.5), True),
        (math.nan, False),
        (-math.inf, False),
        (None, False),
        ("1", False),
    ],
)
def test_a_finite_score(value: Any, finite: bool) -> None:
    assert is_finite(value) is finite


def test_trials_are_stopped_one_by_one() -> None:
    class Each(TrialStopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return True

    assert Each().stop_all() is False
