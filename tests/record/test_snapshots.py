"""Snapshots of a run in a folder, and of one in a bucket (a `file://` URI goes the same way)."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nkat_ray.config import RunConfig
from nkat_ray.files import CURVES_FILE, JOURNAL_FILE, STAGE2_FILE, TRIALS_FILE
from nkat_ray.record import snapshots as module
from nkat_ray.record.journal import Journal, read_state
from nkat_ray.record.run import Run
from nkat_ray.record.snapshots import PUSH_S, SNAPSHOT_S, NoticesInJournal, Snapshots
from nkat_ray.record.storage import RunStorage


class Clock:
    """A clock that stands still unless a test sets it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def make_run(folder: Path, remote: str | None = None) -> Run:
    """Make a run with one trial that has been proposed."""
    folder.mkdir()
    journal = Journal(folder)
    journal.write("run")
    journal.write("proposed", trial=0, params={}, seed=1, study_number=0)
    config = RunConfig.from_preset("quick", name="r")
    return Run(config=config, domains={}, datasets={}, storage=RunStorage(folder, remote), journal=journal)


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def mirrored(tmp_path: Path, bucket: Path) -> Run:
    """A run with a bucket."""
    return make_run(tmp_path / "local", f"file://{bucket}/r")


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def test_the_journal_is_copied_on_a_timer_while_no_trial_ends(mirrored: Run, bucket: Path, clock: Clock) -> None:
    snapshots, copy = Snapshots(mirrored), bucket / "r" / JOURNAL_FILE
    clock.now += PUSH_S - 0.1
    snapshots.on_tick()
    assert not copy.exists()
    for text in ("first", "second"):
        mirrored.journal.write("notice", text=text)
        clock.now += PUSH_S
        snapshots.on_tick()
        assert copy.read_bytes() == mirrored.journal.path.read_bytes()
    mirrored.journal.write("notice", text="third")
    snapshots.on_tick()
    assert read_state(copy.parent).notices == ["first", "second"]


def test_a_bucket_that_does_not_answer_is_noticed_and_tried_again(mirrored: Run, bucket: Path, clock: Clock) -> None:
    bucket.touch()  # a file where the folder should be
    snapshots = Snapshots(mirrored)
    clock.now += PUSH_S
    snapshots.on_tick()
    (notice,) = mirrored.state.notices
    assert notice.startswith("the run's files could not be written or copied just now (")
    bucket.unlink()
    clock.now += PUSH_S - 0.1
    snapshots.on_tick()
    assert not bucket.exists()
    clock.now += 0.1
    snapshots.on_tick()
    assert read_state(bucket / "r").notices == [notice]


def test_the_tables_are_written_as_trials_end_but_not_more_often_than_every_ten_seconds(
    tmp_path: Path, clock: Clock
) -> None:
    run = make_run(tmp_path / "run")
    snapshots = Snapshots(run)
    snapshots.on_trial_end(0, {})
    assert [row["trial"] for row in rows(run.folder / TRIALS_FILE)] == [0]
    assert rows(run.folder / CURVES_FILE) == rows(run.folder / STAGE2_FILE) == []
    run.journal.write("proposed", trial=1, params={}, seed=2, study_number=1)
    clock.now += SNAPSHOT_S - 0.1
    snapshots.on_trial_end(1, {})
    assert len(rows(run.folder / TRIALS_FILE)) == 1
    clock.now += 0.1
    snapshots.on_stage2_row({})
    assert len(rows(run.folder / TRIALS_FILE)) == 2


def test_tables_that_cannot_be_written_are_noticed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.folder / TRIALS_FILE).mkdir()
    Snapshots(run).on_trial_end(0, {})
    assert "could not be written" in run.state.notices[0]


def test_notices_are_kept_in_the_journal(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for text in ("once", "once", "another"):
        NoticesInJournal(run).on_notice(text)
    assert read_state(run.folder).notices == ["once", "another"]
