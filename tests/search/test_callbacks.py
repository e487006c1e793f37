import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nkat_ray.files import JOURNAL_FILE
from nkat_ray.search import callbacks
from nkat_ray.search.callbacks import ROW_KEYS, JournalCallback, Listeners, one_line, remove_checkpoints
from nkat_ray.search.journal import Journal, TrialRecord

NAN = math.nan


class FakeTrial(SimpleNamespace):
    """What the callback looks at of Tune's trial."""

    def __init__(self, number: int, *, error_file: Path | None = None) -> None:
        super().__init__(
            config={"trial": number},
            trial_id=f"id{number}",
            storage=SimpleNamespace(trial_dir_name=f"dir{number}"),
            last_result={},
            error_file=None if error_file is None else str(error_file),
        )


class Heard:
    """Listeners that keep what they were told, with the journal's last event at that moment."""

    def __init__(self, journal: Path) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.journal = journal
        self.before: list[str] = []

    def __call__(self, name: str) -> Callable[..., None]:
        def hear(*arguments: Any) -> None:
            self.calls.append((name, arguments))
            self.before.append(json.loads(self.journal.read_text().splitlines()[-1])["event"])

        return hear

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class Stage:
    """A callback on a journal with three proposed trials, at gate 0.6 and four epochs."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder)
        self.journal.write("run")
        for number in range(3):
            self.journal.write("proposed", trial=number, params={"depth": 5}, seed=1, study_number=number)
        self.heard, self.expired = Heard(folder / JOURNAL_FILE), False
        names = ("on_trial_start", "on_result", "on_trial_end", "on_survivor", "on_notice")
        self.callback = JournalCallback(
            self.journal, folder="/tune/attempt_001", gate=0.6, max_epochs=4, tell=self.heard("tell"),
            expired=lambda: self.expired, listeners=Listeners(**{name: self.heard(name) for name in names}),
        )  # fmt: skip

    def result(self, trial: FakeTrial, epoch: int, score: float, **more: Any) -> None:
        row = {"epoch": epoch, "val_accuracy": score, "local_tpe": score, "train_loss": 1.0, "unknown": "x", **more}
        trial.last_result = row
        self.callback.on_trial_result(0, [], trial, row)  # type: ignore[arg-type]

    def complete(self, trial: FakeTrial) -> TrialRecord:
        self.callback.on_trial_complete(0, [], trial)  # type: ignore[arg-type]
        return self.record(trial)

    def record(self, trial: FakeTrial) -> TrialRecord:
        return self.journal.state.trials[trial.config["trial"]]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


# --- order ------------------------------------------------------------------------------------------------------------


def test_a_start_is_written_and_told(stage: Stage) -> None:
    trial = FakeTrial(1)
    stage.callback.on_trial_start(0, [], trial)  # type: ignore[arg-type]
    assert stage.record(trial).trial_id == "id1"
    assert stage.record(trial).started_s is not None
    assert stage.heard.calls == [("on_trial_start", (1, {"depth": 5}))]


def test_an_epoch_is_written_before_anybody_is_told(stage: Stage) -> None:
    trial = FakeTrial(0)
    scalars = {"nkat/alpha/block_0": 0.1, "nkat/alpha/block_1": 0.2}
    stage.result(trial, 1, 0.3, checkpoint_dir_name="checkpoint_000000", **scalars)
    record = stage.record(trial)
    assert set(record.curve[1]) == {*ROW_KEYS, *scalars}
    assert scalars.items() <= record.curve[1].items()
    assert record.curve[1]["local_tpe"] == 0.3
    assert record.checkpoints == ["/tune/attempt_001/dir0/checkpoint_000000"]
    assert stage.heard.calls == [("on_result", (0, record.curve[1]))]
    assert stage.heard.before == ["result"]


def test_an_end_is_written_before_optuna_and_the_listeners_are_told(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 1, 0.3, done=True, stop_reason="gate", stop_detail="why")
    record = stage.record(trial)
    assert (record.stop_reason, record.stop_detail) == ("gate", "why")
    assert stage.heard.names == ["on_result", "tell", "on_trial_end"]
    assert stage.heard.before[1:] == ["end", "end"]
    assert stage.heard.calls[1] == ("tell", (record,))


def test_an_interrupt_in_a_listener_does_not_part_an_epoch_from_its_end(stage: Stage, tmp_path: Path) -> None:
    """Else the next driver would continue a trial of which all is decided."""
    trial = FakeTrial(0)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    stage.callback._listeners = Listeners(on_result=interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.result(trial, 4, 0.3, done=True, stop_reason="gate", stop_detail="why")
    assert Journal(tmp_path).state.trials[0].stop_reason == "gate"


def test_an_end_is_told_once(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 1, 0.3, done=True, stop_reason="gate")
    stage.complete(trial)
    stage.callback.on_trial_error(0, [], trial)  # type: ignore[arg-type]
    assert stage.heard.names.count("on_trial_end") == 1
    assert stage.record(trial).stop_reason == "gate"


def test_a_survivor_is_told_the_first_time_alone(stage: Stage) -> None:
    trial = FakeTrial(2)
    for epoch, score in enumerate((0.5, 0.6, 0.7, 0.2), start=1):
        stage.result(trial, epoch, score)
    told = [call for call in stage.heard.calls if call[0] == "on_survivor"]
    assert told == [("on_survivor", (2,))]
    assert stage.heard.names[:3] == ["on_result", "on_result", "on_survivor"]


def test_a_result_without_metrics_is_no_epoch(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.callback.on_trial_result(0, [], trial, {"done": False})  # type: ignore[arg-type]
    assert stage.record(trial).curve == {}
    assert stage.heard.calls == []


# --- reasons ----------------------------------------------------------------------------------------------------------


def test_asha_when_nobody_else_stopped_it(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 2, 0.3, done=True)
    record = stage.record(trial)
    assert record.stop_reason == "asha"
    assert record.stop_detail == "epoch 2: Local TPE 0.3000 is not among the rung's best"


def test_finished_when_a_survivor_came_to_the_last_epoch(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 1, 0.7)
    stage.result(trial, 4, 0.65, done=True)
    assert stage.record(trial).stop_reason == "finished"
    assert stage.record(trial).stop_detail == "epoch 4: Local TPE 0.7000 >= gate 0.6"


@pytest.mark.parametrize(("score", "done"), [(0.3, True), (0.7, True), (0.3, False)])
def test_budget_when_the_time_was_used_up(stage: Stage, score: float, done: bool) -> None:
    trial = FakeTrial(0)
    stage.expired = True
    stage.result(trial, 2, score, done=done)
    assert stage.complete(trial).stop_reason == "budget"


def test_finished_wins_over_budget_at_the_last_epoch(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.expired = True
    stage.result(trial, 4, 0.7, done=True)
    assert stage.record(trial).stop_reason == "finished"


@pytest.mark.parametrize("earlier", [[], [0.3], [0.7, 0.5]])
def test_budget_when_a_trial_returned_without_a_new_epoch(stage: Stage, earlier: list[float]) -> None:
    """The gate sees a result without metrics and says `nan`; also of a trial that an earlier driver began."""
    trial = FakeTrial(0)
    for epoch, score in enumerate(earlier, start=1):
        stage.result(trial, epoch, score)
    stage.expired = True
    row = {"done": True, "stop_reason": "nan", "stop_detail": "missing"}
    stage.callback.on_trial_result(0, [], trial, row)  # type: ignore[arg-type]
    assert stage.complete(trial).stop_reason == "budget"


@pytest.mark.parametrize(("scores", "reason"), [([0.1, 0.2, 0.3, 0.4], "gate"), ([0.1, 0.7, 0.3, 0.4], "finished")])
def test_a_trial_that_was_killed_after_its_last_epoch_ends_as_it_would_have(
    stage: Stage, scores: list[float], reason: str
) -> None:
    """Continued by the next driver it has nothing left to train and returns without a result."""
    trial = FakeTrial(0)
    for epoch, score in enumerate(scores, start=1):
        stage.result(trial, epoch, score)
    row = {"done": True, "stop_reason": "nan", "stop_detail": "missing"}
    stage.callback.on_trial_result(0, [], trial, row)  # type: ignore[arg-type]
    record = stage.complete(trial)
    assert record.stop_reason == reason
    assert record.stop_detail is not None
    assert record.stop_detail.startswith("epoch 4: Local TPE")


def test_a_trial_that_returned_without_an_epoch_for_no_known_reason_is_nan(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 1, 0.3)
    row = {"done": True, "stop_reason": "nan", "stop_detail": "missing"}
    stage.callback.on_trial_result(0, [], trial, row)  # type: ignore[arg-type]
    assert (stage.complete(trial).stop_reason, stage.record(trial).stop_detail) == ("nan", "missing")


def test_nan_stays_nan(stage: Stage) -> None:
    """Also when the time is used up, and in the last epoch."""
    for number, (epoch, stage.expired) in enumerate(((1, False), (2, True), (4, False))):
        trial = FakeTrial(number)
        stage.result(trial, epoch, NAN, done=True, stop_reason="nan", stop_detail="epoch")
        assert stage.record(trial).stop_reason == "nan"


def test_the_gates_reason_wins_over_the_clock(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.expired = True
    stage.result(trial, 2, 0.3, done=True, stop_reason="smoke")
    assert stage.record(trial).stop_reason == "smoke"


# --- errors -----------------------------------------------------------------------------------------------------------


ERRORS = """\
Failure # 1 (occurred at 2026-01-01_00-00-00)
Traceback
RuntimeError: the first
Failure # 2 (occurred at 2026-01-01_00-01-00)
Traceback
  File "x.py", line 1, in f
RuntimeError: on purpose

"""


def test_an_error_ends_the_trial_with_one_line_of_the_newest(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(ERRORS)
    trial = FakeTrial(0, error_file=tmp_path / "error.txt")
    stage.callback.on_trial_error(0, [], trial)  # type: ignore[arg-type]
    record = stage.record(trial)
    assert (record.stop_reason, record.error, record.stop_detail) == ("error", *["RuntimeError: on purpose"] * 2)
    assert stage.heard.names == ["tell", "on_trial_end"]


def test_a_full_disk_ends_the_run_and_not_the_trial(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text("Traceback\nOSError: [Errno 28] No space left on device\n")
    trial = FakeTrial(0, error_file=tmp_path / "error.txt")
    stage.result(trial, 1, 0.3)
    with pytest.raises(OSError, match="trial 0 cannot store its checkpoints"):
        stage.callback.on_trial_error(0, [], trial)  # type: ignore[arg-type]
    assert not stage.record(trial).ended


@pytest.mark.parametrize("error_file", [None, Path("/nowhere/error.txt")])
def test_an_error_without_a_text_after_some_epochs_keeps_them(stage: Stage, error_file: Path | None) -> None:
    trial = FakeTrial(0, error_file=error_file)
    stage.result(trial, 1, 0.3)
    stage.callback.on_trial_error(0, [], trial)  # type: ignore[arg-type]
    assert (list(stage.record(trial).curve), stage.record(trial).error) == ([1], "its process was lost")


def test_a_trial_that_is_tried_again_is_noticed(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(ERRORS)
    stage.callback.on_trial_recover(0, [], FakeTrial(2, error_file=tmp_path / "error.txt"))  # type: ignore[arg-type]
    expected = "trial 2 is tried again after a fault: RuntimeError: on purpose"
    assert stage.heard.calls == [("on_notice", (expected,))]


def test_notices_of_a_trial_are_told_with_its_number(stage: Stage) -> None:
    stage.result(FakeTrial(1), 1, 0.3, notices=["out of memory", "again"])
    assert stage.heard.calls[1:] == [("on_notice", (f"trial 1: {text}",)) for text in ("out of memory", "again")]


def test_checkpoints_that_cannot_be_removed_do_not_end_the_search(stage: Stage, monkeypatch: Any) -> None:
    def unreachable(_: TrialRecord) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(callbacks, "remove_checkpoints", unreachable)
    trial = FakeTrial(0)
    stage.result(trial, 4, 0.3, done=True, stop_reason="gate")
    assert stage.complete(trial).stop_reason == "gate"
    assert stage.heard.names[-1] == "on_notice"


@pytest.mark.parametrize(
    ("error", "expected"),
    [("a\nb\n", "b"), ("", "str"), (None, "None"), (ValueError(""), "ValueError"), ("x" * 600, "x" * 500)],
)
def test_one_line(error: Any, expected: str) -> None:
    assert one_line(error) == expected


# --- disk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_checkpoints_are_removed_where_they_still_are(tmp_path: Path, prefix: str) -> None:
    folders = [tmp_path / name for name in ("checkpoint_000000", "checkpoint_000001")]
    folders[1].mkdir()
    (folders[1] / "state.pt").write_bytes(b"x")
    (tmp_path / "result.json").touch()
    remove_checkpoints(TrialRecord(0, {}, 0, 0, checkpoints=[f"{prefix}{folder}" for folder in folders]))
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_survivors_checkpoints_stay_and_the_others_go(stage: Stage, tmp_path: Path) -> None:
    stage.callback._folder = str(tmp_path)
    for number, score in ((0, 0.7), (1, 0.3)):
        trial = FakeTrial(number)
        (tmp_path / f"dir{number}" / "checkpoint_000000").mkdir(parents=True)
        stage.result(trial, 4, score, done=True, checkpoint_dir_name="checkpoint_000000")
        stage.complete(trial)
    assert [path.parent.name for path in tmp_path.glob("*/checkpoint_*")] == ["dir0"]


def test_it_pickles_as_nothing(stage: Stage) -> None:
    assert stage.callback.__getstate__() == {}


# --- other schedulers, ends without a start, the loop's beat ----------------------------------------------------------


def stage_with(folder: Path, **options: Any) -> Stage:
    stage = Stage(folder)
    given = stage.callback
    stage.callback = JournalCallback(
        stage.journal, folder="/tune/attempt_001", gate=0.6, max_epochs=4, tell=given._tell, expired=lambda: False,
        listeners=given._listeners, **options,
    )  # fmt: skip
    return stage


def test_an_end_of_the_scheduler_is_in_its_own_words(tmp_path: Path) -> None:
    stage = stage_with(tmp_path, verdict="is below the median")
    trial = FakeTrial(0)
    stage.result(trial, 2, 0.3, done=True)
    assert stage.record(trial).stop_reason == "asha"
    assert stage.record(trial).stop_detail == "epoch 2: Local TPE 0.3000 is below the median"


def test_every_step_of_tune_advances_what_waits(tmp_path: Path) -> None:
    steps: list[int] = []
    stage = stage_with(tmp_path, advance=lambda: steps.append(1))
    for iteration in range(3):
        stage.callback.on_step_end(iteration, [])
    assert len(steps) == 3


def test_a_trial_that_does_not_start_again_is_ended_once_and_everybody_is_told(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 1, 0.3)
    record = stage.record(trial)
    for _ in range(2):
        stage.callback.end(record, "budget", "enough")
    assert (record.stop_reason, record.stop_detail) == ("budget", "enough")
    assert stage.heard.names == ["on_result", "tell", "on_trial_end"]
