"""`nkat stop`: what it refuses, and the request that it leaves; test_stage1.py stops real trials."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.record.journal import Journal
from nkat_ray.record.requests import requested_stops
from nkat_ray.record.storage import RunStorage, run_storage

NO_DRIVER = "no driver of it works on this machine; type the command on its driver's machine"


def begin(folder: Path) -> None:
    """A run in which trial 0 has ended and trials 1 and 2 are under way."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    journal = Journal(folder)
    for number in range(3):
        journal.write("proposed", trial=number, params={}, seed=0, study_number=number)
    journal.write("end", trial=0, stop_reason="asha", stop_detail=None, error=None)
    journal.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    begin(tmp_path / "r")
    return tmp_path / "r"


@pytest.fixture
def driven(run: Path) -> Iterator[Path]:
    """The same run, with a driver that works on it."""
    with RunStorage(run, None).lock():
        yield run


def test_a_trial_under_way_is_requested(driven: Path, nkat_script: Callable[..., Any]) -> None:
    code, said, _ = nkat_script("stop", driven, 2)
    assert (code, said) == (0, "trial 2 of r ends in a few seconds, with the stop reason user\n")
    assert set(requested_stops(driven)) == {2}


def test_a_script_gets_one_document(driven: Path, nkat_script: Callable[..., Any]) -> None:
    code, said, _ = nkat_script("stop", driven, 1, "--json")
    assert (code, json.loads(said)) == (0, {"run": str(driven), "trial": 1})


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        (0, "trial is 0; it has ended (asha); under way: 1, 2"),
        (3, "trial is 3; the run has no such trial; under way: 1, 2"),
        (-1, "trial is -1; allowed: a whole number, >= 0"),
        ("one", "trial is 'one'; allowed: a whole number, >= 0"),
    ],
)
def test_a_trial_that_cannot_be_stopped_is_refused(
    trial: object, said: str, driven: Path, nkat_script: Callable[..., Any]
) -> None:
    assert nkat_script("stop", driven, trial) == (2, "", f"error: {said}\n")
    assert requested_stops(driven) == {}


def test_an_empty_run_is_refused(nkat_script: Callable[..., Any]) -> None:
    assert nkat_script("stop", "", 1) == (2, "", "error: run is ''; it is empty; allowed: text with a path\n")


def test_a_run_without_a_driver_is_refused(run: Path, nkat_script: Callable[..., Any]) -> None:
    code, _, said = nkat_script("stop", run, 1)
    assert (code, said.count("\n")) == (2, 1)
    assert "it is not in progress: no driver works on it; --resume continues" in said
    assert requested_stops(run) == {}


def test_a_folder_that_holds_no_run_is_refused_and_left_as_it_is(
    tmp_path: Path, nkat_script: Callable[..., Any]
) -> None:
    code, _, said = nkat_script("stop", tmp_path, 1)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "that folder holds no run" in said
    assert nkat_script("stop", tmp_path / "none", 1)[0] == 2
    assert not (tmp_path / "none").exists()


def test_a_run_in_a_bucket_is_stopped_on_its_drivers_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nkat_script: Callable[..., Any]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, _, said = nkat_script("stop", "s3://bucket/runs/r", 1)
    assert (code, said) == (2, f"error: run is 's3://bucket/runs/r'; {NO_DRIVER}\n")  # without asking the bucket
    storage = run_storage("s3://bucket/runs", "r")
    begin(storage.local)
    assert NO_DRIVER in nkat_script("stop", "s3://bucket/runs/r/", 1)[2]
    with storage.lock():
        assert nkat_script("stop", "s3://bucket/runs/r/", 1)[0] == 0
    assert set(requested_stops(storage.local)) == {1}
