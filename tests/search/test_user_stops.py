"""Trials that the user stops, with Tune's trials invented; test_stage1.py has Ray's own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nkat_ray.record.journal import RunState, TrialRecord
from nkat_ray.record.requests import request_stop, requested_stops
from nkat_ray.search import user_stops as module
from nkat_ray.search.stops import stop_of
from nkat_ray.search.user_stops import POLL_S, UserStops


class Setting:
    """Trials 0 (running, after an epoch), 1 (waits for its slot) and 2 (has ended); the clock and whom Ray killed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.killed = 100.0, list[str]()
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(module, "ray", SimpleNamespace(kill=self.killed.append))
        self.state = RunState({n: TrialRecord(n, {}, 0, n) for n in range(3)})
        self.state.trials[0].curve[1] = {"epoch": 1, "local_tpe": 0.5}
        self.state.trials[2].stop_reason = "asha"
        self.trials: list[Any] = [
            SimpleNamespace(
                config={"trial": n}, status=status, max_failures=2,
                temporary_state=SimpleNamespace(ray_actor=f"actor {n}"),
            )
            for n, status in enumerate(("RUNNING", "PENDING", "TERMINATED"))
        ]  # fmt: skip
        self.folder, self.stops = folder, UserStops(folder, self.state)

    def act(self) -> None:
        self.now += POLL_S
        self.stops.act(self.trials)

    @property
    def left(self) -> set[int]:
        return set(requested_stops(self.folder))


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(tmp_path, monkeypatch)


def test_a_running_trial_is_killed_for_good_and_its_request_stays_until_it_has_ended(setting: Setting) -> None:
    request_stop(setting.folder, 0)
    setting.act()
    assert setting.killed == ["actor 0"]
    assert setting.trials[0].max_failures == 0
    assert stop_of(setting.trials[0], {}) == ("user", "stopped with nkat stop")
    assert setting.left == {0}
    setting.state.trials[0].stop_reason = "user"
    setting.act()
    assert (setting.killed, setting.left) == (["actor 0"], set())


def test_a_trial_that_waits_for_its_slot_is_killed_when_it_has_it(setting: Setting) -> None:
    request_stop(setting.folder, 1)
    setting.act()
    assert (setting.killed, setting.left) == ([], {1})
    setting.trials[1].status = "RUNNING"
    setting.act()
    assert setting.killed == ["actor 1"]
    assert stop_of(setting.trials[1], {}) == ("user", "stopped with nkat stop")


def test_a_request_that_came_too_late_is_removed_and_one_for_no_trial_stays(setting: Setting) -> None:
    request_stop(setting.folder, 2)
    request_stop(setting.folder, 9)
    setting.act()
    assert (setting.killed, setting.left) == ([], {9})


def test_the_folder_is_read_every_two_seconds(setting: Setting) -> None:
    setting.act()
    request_stop(setting.folder, 0)
    setting.now += POLL_S / 2
    setting.stops.act(setting.trials)
    assert setting.killed == []
    setting.now += POLL_S / 2
    setting.stops.act(setting.trials)
    assert setting.killed == ["actor 0"]


def test_an_unfinished_trial_of_an_earlier_driver_has_its_reason_without_a_process(setting: Setting) -> None:
    request_stop(setting.folder, 1)
    assert setting.stops.stop(setting.state.trials[1]) == ("user", "stopped with nkat stop")
    assert setting.stops.stop(setting.state.trials[0]) is None
