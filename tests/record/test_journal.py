import dataclasses
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nkat_ray.errors import UserError
from nkat_ray.files import JOURNAL_FILE
from nkat_ray.record import journal as journal_module
from nkat_ray.record.journal import Journal, RunState, TrialRecord, read_state


class Clock:
    """A clock that stands still unless a test sets it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(journal_module, "time", clock)
    return clock


def row(epoch: int, score: float = 0.3) -> dict[str, Any]:
    return {"epoch": epoch, "local_tpe": score, "val_accuracy": score}


def propose(journal: Journal, trial: int) -> None:
    journal.write("proposed", trial=trial, params={"depth": 5, "top_p": 0.8}, seed=trial + 100, study_number=trial)


def some_events(journal: Journal) -> None:
    """One of each kind."""
    journal.write("run")
    journal.write("slots", slots=2)
    propose(journal, 0)
    propose(journal, 1)
    journal.write("started", trial=0, trial_id="aaa")
    journal.write("result", trial=0, row=row(1, 0.2), checkpoint="/c/0")
    journal.write("result", trial=0, row=row(2, math.nan), checkpoint=None)
    journal.write("end", trial=0, stop_reason="nan", stop_detail="epoch 2", error=None)
    journal.write("notice", text="once")
    journal.write("notice", text="once")
    journal.write("stage1_done")
    journal.write("stage2", row={"trial": 0, "dataset": "mnist", "val_tpe": 0.5})
    journal.write("ranked", order=[0])
    journal.write("tested", row={"trial": 0, "dataset": "mnist", "test_accuracy": 0.9})


def same(one: RunState, other: RunState) -> bool:
    return repr(dataclasses.asdict(one)) == repr(dataclasses.asdict(other))  # NaN equals NaN in repr


def test_a_new_journal_is_empty(tmp_path: Path) -> None:
    assert same(Journal(tmp_path).state, RunState())
    assert same(read_state(tmp_path), RunState())


def test_reading_where_there_is_none_makes_none(tmp_path: Path) -> None:
    read_state(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_replay_equals_the_live_state(tmp_path: Path) -> None:
    live = Journal(tmp_path)
    some_events(live)
    assert same(read_state(tmp_path), live.state)  # still open: what was written is on disk
    live.close()
    again = Journal(tmp_path)
    assert same(again.state, live.state)
    again.close()
    assert same(read_state(tmp_path), live.state)  # opening writes nothing


def test_every_event_is_passed_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    some_events(journal)
    state = journal.state
    record = state.trials[0]
    assert (record.trial_id, record.stop_reason, record.stop_detail, record.ended) == ("aaa", "nan", "epoch 2", True)
    assert (record.params, record.seed, record.study_number) == ({"depth": 5, "top_p": 0.8}, 100, 0)
    assert (sorted(record.curve), record.checkpoints) == ([1, 2], ["/c/0"])
    assert not state.trials[1].ended
    assert (state.slot_changes[-1][1], state.stage1_done, state.order, state.notices) == (2, True, [0], ["once"])
    assert state.stage2[0, "mnist"]["val_tpe"] == 0.5
    assert state.tested[0, "mnist"]["test_accuracy"] == 0.9


def test_however_a_kill_cuts_the_file_what_is_read_is_the_state_after_some_event(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    some_events(journal)
    journal.close()
    lines = (tmp_path / JOURNAL_FILE).read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    state = RunState()
    for number, line in enumerate(lines):
        for rest in (0, 1, len(line) // 2, len(line) - 1):
            (cut / JOURNAL_FILE).write_bytes(b"".join(lines[:number]) + line[:rest])
            assert same(read_state(cut), state)
        state.apply(json.loads(line))


def test_a_last_line_cut_short_is_dropped_and_overwritten(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    propose(journal, 0)
    propose(journal, 1)
    journal.close()
    path = tmp_path / JOURNAL_FILE
    path.write_bytes(path.read_bytes()[:-7])
    again = Journal(tmp_path)
    assert sorted(again.state.trials) == [0]
    propose(again, 1)
    again.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["trial"] for line in lines] == [0, 1]


def test_a_reader_leaves_a_line_that_is_being_written_alone(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_bytes(b'{"event": "run", "time_s": 1.0}\n{"event": "slo')
    assert read_state(tmp_path).attempts == [(1.0, 1.0)]
    assert (tmp_path / JOURNAL_FILE).read_bytes().endswith(b'{"event": "slo')


NULS = b"\0" * 300  # a block that the file system had promised and never written

DAMAGED = {
    "a line of NUL bytes": NULS + b"\n",
    "NUL bytes before an event": NULS + b'{"event": "notice", "time_s": 1.0, "text": "x"}\n',
    "no JSON": b"{'event': 1}\n",
    "no event": b"[1, 2]\n",
    "an event about an unknown trial": b'{"event": "started", "time_s": 1.0, "trial": 9, "trial_id": "x"}\n',
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_line_is_refused_by_name_and_nothing_behind_it_is_lost(tmp_path: Path, line: bytes) -> None:
    journal = Journal(tmp_path)
    journal.write("run")
    propose(journal, 0)
    journal.close()
    before = journal.path.read_bytes()
    after = b'{"event": "stage1_done", "time_s": 1.0}\n'
    journal.path.write_bytes(before + line + after + b"cut short")
    for read in (read_state, Journal):
        with pytest.raises(UserError, match=r"line 3 of 4 is damaged, .*--resume") as refused:
            read(tmp_path)
    assert str(journal.path) in str(refused.value)
    assert journal.path.read_bytes() == before + line + after + b"cut short"
    advice = str(refused.value).split("`")[1]
    subprocess.run(advice, shell=True, check=True)
    assert sorted(Journal(tmp_path).state.trials) == [0]
    assert journal.path.read_bytes() == before
    assert (tmp_path / f"{JOURNAL_FILE}.damaged").read_bytes() == before + line + after + b"cut short"


def test_nul_bytes_at_the_end_are_a_line_that_was_cut_short(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    propose(journal, 0)
    journal.close()
    before = journal.path.read_bytes()
    journal.path.write_bytes(before + NULS)
    Journal(tmp_path).close()
    assert journal.path.read_bytes() == before


def test_results_are_kept_by_epoch(tmp_path: Path) -> None:
    """A trial that is repeated from its checkpoint after a fault reports an epoch a second time."""
    journal = Journal(tmp_path)
    propose(journal, 0)
    for checkpoint in ("/c/0", "/c/1"):
        for _ in range(2):
            journal.write("result", trial=0, row=row(1), checkpoint=checkpoint)
    record = journal.state.trials[0]
    assert list(record.curve) == [1]
    assert record.checkpoints == ["/c/0", "/c/1"]


def test_a_checkpoint_reported_again_is_the_newest(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    propose(journal, 0)
    for epoch, checkpoint in ((1, "/c/0"), (2, "/c/1"), (1, "/c/0"), (2, None)):
        journal.write("result", trial=0, row=row(epoch), checkpoint=checkpoint)
    assert journal.state.trials[0].checkpoints == ["/c/1", "/c/0"]


def test_the_first_start_counts_and_the_last_trial_id(tmp_path: Path, clock: Clock) -> None:
    journal = Journal(tmp_path)
    propose(journal, 0)
    for clock.now, trial_id in ((1001.0, "old"), (1005.0, "new")):
        journal.write("started", trial=0, trial_id=trial_id)
    assert (journal.state.trials[0].started_s, journal.state.trials[0].trial_id) == (1001.0, "new")


def test_wall_time_is_the_sum_of_the_drivers_lives(tmp_path: Path, clock: Clock) -> None:
    journal = Journal(tmp_path)
    for kind, now in (("run", 0), ("notice", 5), ("notice", 9), ("run", 100), ("notice", 101)):
        clock.now = float(now)
        journal.write(kind, text="x")
    assert journal.state.attempts == [(0.0, 9.0), (100.0, 101.0)]
    assert (journal.state.wall_s, journal.state.earlier_s) == (10.0, 9.0)


def test_a_clock_put_back_does_not_shorten_a_life(tmp_path: Path, clock: Clock) -> None:
    journal = Journal(tmp_path)
    for kind, now in (("run", 100), ("notice", 160), ("notice", 90)):
        clock.now = float(now)
        journal.write(kind, text="x")
    assert journal.state.wall_s == 60.0


def test_best_row_is_the_first_of_equals_and_never_nan(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    propose(journal, 0)
    record = journal.state.trials[0]
    assert record.best_row() is None
    journal.write("result", trial=0, row=row(1, math.nan), checkpoint=None)
    assert record.best_row() is None
    for epoch, score in ((2, 0.4), (3, 0.6), (4, 0.6), (5, math.nan), (6, 0.1)):
        journal.write("result", trial=0, row=row(epoch, score), checkpoint=None)
    best = record.best_row()
    assert best is not None
    assert best["epoch"] == 3
    assert [r["epoch"] for r in record.finite_rows()] == [2, 3, 4, 6]


def test_survivors_are_those_whose_best_reaches_the_gate(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for trial, scores in enumerate(([0.6, 0.1], [0.5999], [math.nan], [], [0.9, math.nan])):
        propose(journal, trial)
        for epoch, score in enumerate(scores, start=1):
            journal.write("result", trial=trial, row=row(epoch, score), checkpoint=None)
    assert journal.state.survivors(0.6) == [0, 4]
    assert read_state(tmp_path).survivors(0.6) == [0, 4]


def test_an_event_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text('{"event": "unheard_of", "time_s": 1.0, "x": 2}\n')
    assert same(Journal(tmp_path).state, RunState())


def test_the_best_epoch_is_the_first_of_the_best_and_none_without_a_finite_score() -> None:
    def curve(*scores: float) -> TrialRecord:
        rows = {e: {"epoch": e, "local_tpe": score} for e, score in enumerate(scores, start=1)}
        return TrialRecord(0, {}, 0, 0, curve=rows)

    assert curve(0.1, 0.5, 0.5, 0.2).best_epoch == 2
    assert curve(math.nan).best_epoch is None
    assert curve().best_epoch is None


def test_that_the_study_knows_an_earlier_run_is_remembered(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert not journal.state.warmed
    journal.write("warmed")
    journal.close()
    assert Journal(tmp_path).state.warmed


def test_irreplaceable_events_are_synced_at_once_and_the_others_within_a_second(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[float] = []
    monkeypatch.setattr(journal_module.os, "fsync", lambda _: synced.append(clock.now))
    journal = Journal(tmp_path)
    propose(journal, 0)
    for clock.now in (1000.1, 1000.9, 1001.5, 1001.6):
        journal.write("result", trial=0, row=row(1), checkpoint=None)
    assert synced == [1000.0, 1001.5]
    clock.now = 1001.7
    journal.write("end", trial=0, stop_reason="gate", stop_detail=None, error=None)
    assert synced == [1000.0, 1001.5, 1001.7]
    journal.close()
    assert len(synced) == 4


def test_a_run_begins_when_its_command_was_typed(tmp_path: Path, clock: Clock) -> None:
    journal = Journal(tmp_path)
    journal.write("run", began_s=990.0)
    assert journal.state.attempts == [(990.0, 1000.0)]


def test_survivors_are_known_without_looking_at_the_curves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is asked at each result: 10,000 trials must not be scored each time."""
    state, scores = RunState(), np.random.default_rng(0).uniform(0.4, 0.7, (50, 4)).round(2)
    scores[::7, :2] = math.nan
    for trial in range(50):
        state.apply(
            {"event": "proposed", "time_s": 0.0, "trial": trial, "params": {}, "seed": 0, "study_number": trial}
        )
        for epoch, score in enumerate(scores[trial], start=1):
            row = {"epoch": epoch, "local_tpe": float(score)}
            state.apply({"event": "result", "time_s": 0.0, "trial": trial, "row": row, "checkpoint": None})
    lost = {"epoch": int(np.nanargmax(scores[1])) + 1, "local_tpe": math.nan}  # a retry diverges where the best was
    state.apply({"event": "result", "time_s": 0.0, "trial": 1, "row": lost, "checkpoint": None})
    scores[1][lost["epoch"] - 1] = math.nan
    state.apply({"event": "proposed", "time_s": 0.0, "trial": 50, "params": {}, "seed": 0, "study_number": 50})
    gone = {"epoch": 1, "local_tpe": 0.7}
    for row in (gone, {**gone, "local_tpe": math.nan}):
        state.apply({"event": "result", "time_s": 0.0, "trial": 50, "row": row, "checkpoint": None})
    expected = {trial: best for trial, best in enumerate(np.nanmax(scores, axis=1).tolist()) if best >= 0.6}
    monkeypatch.setattr(TrialRecord, "finite_rows", None)
    assert state.survivor_scores(0.6) == expected
    assert state.survivors(0.6) == sorted(expected)
