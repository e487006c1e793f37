"""Requests in a run's folder."""

from pathlib import Path

from nkat_ray.record.requests import request_stop, requested_stops


def test_a_request_is_found_by_its_trials_number_until_it_is_removed(tmp_path: Path) -> None:
    assert requested_stops(tmp_path) == {}
    for trial in (12, 0, 12):
        request_stop(tmp_path, trial)
    assert set(requested_stops(tmp_path)) == {0, 12}
    requested_stops(tmp_path)[12].unlink()
    assert set(requested_stops(tmp_path)) == {0}


def test_what_else_lies_there_is_no_request(tmp_path: Path) -> None:
    request_stop(tmp_path, 3)
    for name in (".4.0a1b2c3d", "5.tmp", "x", "-1", "²", "٣"):  # a part of a file, an editor's copy, ...
        (tmp_path / "stop" / name).touch()
    assert set(requested_stops(tmp_path)) == {3}
