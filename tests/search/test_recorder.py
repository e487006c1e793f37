import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nkat_ray.files import JOURNAL_FILE
from nkat_ray.record.journal import Journal, TrialRecord
from nkat_ray.search import recorder
from nkat_ray.search.recorder import ROW_KEYS, UNEXPLAINED, Recorder, remove_checkpoints
from nkat_ray.search.stops import Stop, leave_on_trial

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
    """A stage that keeps what it was handed, with the journal's last event at that moment."""

    def __init__(self, journal: Path) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.journal = journal
        self.before: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def hear(*arguments: Any) -> None:
            self.calls.append((name, arguments))
            self.before.append(json.loads(self.journal.read_text().splitlines()[-1])["event"])

        return hear

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class Stage:
    """A recorder on a journal with three proposed trials, at gate 0.6."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder)
        self.journal.write("run")
        for number in range(3):
            self.journal.write("proposed", trial=number, params={"depth": 5}, seed=1, study_number=number)
        self.heard = Heard(folder / JOURNAL_FILE)
        self.callback = Recorder(self.journal, gate=0.6, folder="/tune/attempt_001", stage=self.heard)

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
    assert stage.heard.calls == [("on_trial_start", (stage.record(trial),))]


def test_an_epoch_is_written_before_it_is_passed_on(stage: Stage) -> None:
    trial = FakeTrial(0)
    scalars = {"nkat/alpha/block_0": 0.1, "nkat/alpha/block_1": 0.2}
    stage.result(trial, 1, 0.3, checkpoint_dir_name="checkpoint_000000", **scalars)
    record = stage.record(trial)
    assert set(record.curve[1]) == {*ROW_KEYS, *scalars}
    assert scalars.items() <= record.curve[1].items()
    assert record.curve[1]["local_tpe"] == 0.3
    assert record.checkpoints == ["/tune/attempt_001/dir0/checkpoint_000000"]
    assert stage.heard.calls == [("on_epoch", (record, record.curve[1]))]
    assert stage.heard.before == ["result"]


def test_an_end_is_written_before_optuna_and_the_observers_receive_it(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 1, 0.3, done=True, stop_reason="gate", stop_detail="why")
    record = stage.record(trial)
    assert (record.stop_reason, record.stop_detail) == ("gate", "why")
    assert stage.heard.names == ["on_epoch", "on_end"]
    assert stage.heard.before == ["end", "end"]
    assert stage.heard.calls[1] == ("on_end", (record,))


def test_an_interrupt_in_a_listener_does_not_part_an_epoch_from_its_end(stage: Stage, tmp_path: Path) -> None:
    """Else the next driver would continue a trial of which all is decided."""
    trial = FakeTrial(0)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    stage.heard.on_epoch = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stage.result(trial, 4, 0.3, done=True, stop_reason="gate", stop_detail="why")
    assert Journal(tmp_path).state.trials[0].stop_reason == "gate"


def test_a_trial_that_was_killed_on_purpose_ends_with_the_reason_that_was_left(stage: Stage, tmp_path: Path) -> None:
    errors = tmp_path / "error.txt"
    errors.write_text("ray.exceptions.ActorDiedError: killed by ray.kill")
    trial = FakeTrial(0, error_file=errors)
    leave_on_trial(trial, Stop("user", "why"))  # type: ignore[arg-type]
    stage.callback.on_trial_error(0, [], trial)  # type: ignore[arg-type]
    record = stage.record(trial)
    assert (record.stop_reason, record.stop_detail, record.error) == ("user", "why", None)
    assert stage.callback.first_error is None


def test_an_end_is_passed_on_once(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 1, 0.3, done=True, stop_reason="gate")
    stage.complete(trial)
    stage.callback.on_trial_error(0, [], trial)  # type: ignore[arg-type]
    assert stage.heard.names.count("on_end") == 1
    assert stage.record(trial).stop_reason == "gate"


def test_a_survivor_is_passed_on_only_the_first_time(stage: Stage) -> None:
    trial = FakeTrial(2)
    for epoch, score in enumerate((0.5, 0.6, 0.7, 0.2), start=1):
        stage.result(trial, epoch, score)
    told = [call for call in stage.heard.calls if call[0] == "on_survivor"]
    assert told == [("on_survivor", (stage.record(trial),))]
    assert stage.heard.names[:3] == ["on_epoch", "on_epoch", "on_survivor"]


def test_a_result_without_metrics_is_no_epoch(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.callback.on_trial_result(0, [], trial, {"done": False})  # type: ignore[arg-type]
    assert stage.record(trial).curve == {}
    assert stage.heard.calls == []


# --- reasons ----------------------------------------------------------------------------------------------------------


def test_the_reason_of_gate_budget_or_worker_is_the_one_in_the_result(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 2, 0.3, done=True, stop_reason="smoke", stop_detail="why")
    assert (stage.record(trial).stop_reason, stage.record(trial).stop_detail) == ("smoke", "why")


def test_the_schedulers_reason_travels_with_the_trial(stage: Stage) -> None:
    trial = FakeTrial(0)
    leave_on_trial(trial, Stop("asha", "not among the best"))  # type: ignore[arg-type]
    stage.result(trial, 2, 0.3, done=True)
    assert (stage.record(trial).stop_reason, stage.record(trial).stop_detail) == ("asha", "not among the best")


def test_a_worker_that_returns_has_said_why_in_its_last_report(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 1, 0.3)
    trial.last_result = {"stop_reason": "budget", "stop_detail": "time"}
    stage.callback.on_trial_result(0, [], trial, trial.last_result)  # type: ignore[arg-type]
    assert not stage.record(trial).ended
    assert stage.complete(trial).stop_reason == "budget"
    assert list(stage.record(trial).curve) == [1]


def test_an_end_without_a_reason_is_an_error(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 1, 0.3)
    record = stage.complete(trial)
    assert (record.stop_reason, record.error) == ("error", UNEXPLAINED)


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
    assert stage.heard.names == ["on_end"]


def test_an_error_in_the_encoding_of_a_japanese_windows_is_read(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune writes its file in the locale's encoding."""
    monkeypatch.setattr("locale.getencoding", lambda: "cp932")
    (tmp_path / "error.txt").write_text("OSError: ディスクがいっぱいです\n", encoding="cp932")
    trial = FakeTrial(0, error_file=tmp_path / "error.txt")
    stage.callback.on_trial_error(0, [], trial)  # type: ignore[arg-type]
    assert stage.record(trial).error == "OSError: ディスクがいっぱいです"


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
    expected = "trial 2 is retried after an error: RuntimeError: on purpose"
    assert stage.heard.calls == [("on_notice", (expected,))]


def test_notices_of_a_trial_have_its_number(stage: Stage) -> None:
    stage.result(FakeTrial(1), 1, 0.3, notices=["out of memory", "again"])
    assert stage.heard.calls[1:] == [("on_notice", (f"trial 1: {text}",)) for text in ("out of memory", "again")]


def test_checkpoints_that_cannot_be_removed_do_not_end_the_search(stage: Stage, monkeypatch: Any) -> None:
    def unreachable(_: TrialRecord, *, keep_weights: bool) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(recorder, "remove_checkpoints", unreachable)
    trial = FakeTrial(0)
    stage.result(trial, 4, 0.3, done=True, stop_reason="gate")
    assert stage.complete(trial).stop_reason == "gate"
    assert stage.heard.names[-1] == "on_notice"


# --- disk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_checkpoints_are_removed_where_they_still_are(tmp_path: Path, prefix: str) -> None:
    folders = [tmp_path / name for name in ("checkpoint_000000", "checkpoint_000001")]
    folders[1].mkdir()
    (folders[1] / "state.pt").write_bytes(b"x")
    (tmp_path / "result.json").touch()
    record = TrialRecord(0, {}, 0, 0, checkpoints=[f"{prefix}{folder}" for folder in folders])
    remove_checkpoints(record, keep_weights=False)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_the_newest_checkpoint_keeps_the_weights_without_the_state(tmp_path: Path, prefix: str) -> None:
    folders = [tmp_path / name for name in ("checkpoint_000000", "checkpoint_000001")]
    for folder in folders:
        folder.mkdir()
        for name in ("state.pt", "weights.safetensors"):
            (folder / name).write_bytes(b"x")
    record = TrialRecord(0, {}, 0, 0, checkpoints=[f"{prefix}{folder}" for folder in folders])
    for _ in range(2):  # a driver that is killed in between does it again
        remove_checkpoints(record, keep_weights=True)
        assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")] == [
            Path("checkpoint_000001/weights.safetensors")
        ]


def ended_in_order(stage: Stage, folder: Path, scores: Sequence[float]) -> dict[int, list[str]]:
    """End trials with these scores one after the other; the files of their checkpoints that are left."""
    stage.callback._folder = str(folder)
    for number, score in enumerate(scores):
        if number > 2:
            stage.journal.write("proposed", trial=number, params={}, seed=1, study_number=number)
        checkpoint = folder / f"dir{number}" / "checkpoint_000000"
        checkpoint.mkdir(parents=True)
        for name in ("state.pt", "weights.safetensors"):
            (checkpoint / name).write_bytes(b"x")
        trial = FakeTrial(number)
        stage.result(trial, 4, score, done=True, stop_reason="gate", checkpoint_dir_name="checkpoint_000000")
        stage.complete(trial)
    left = {n: sorted(p.name for p in folder.glob(f"dir{n}/*/*")) for n in range(len(scores))}
    return {number: names for number, names in left.items() if names}


WEIGHTS = ["weights.safetensors"]
WHOLE = ["state.pt", *WEIGHTS]


@pytest.mark.parametrize(
    ("scores", "left"),
    [
        ((0.1, 0.2, 0.3, 0.4), {1: WEIGHTS, 2: WEIGHTS, 3: WEIGHTS}),  # each is the best so far
        ((0.4, 0.3, 0.2, 0.1), {0: WEIGHTS, 1: WEIGHTS, 2: WEIGHTS}),
        ((0.3, 0.3, 0.3, 0.3), {0: WEIGHTS, 1: WEIGHTS, 2: WEIGHTS}),  # of equals the first
        ((0.1, NAN, 0.2, 0.3), {0: WEIGHTS, 2: WEIGHTS, 3: WEIGHTS}),
        ((0.1, 0.7, 0.2, 0.3), {1: WHOLE, 2: WEIGHTS, 3: WEIGHTS}),
        ((0.1, 0.7, 0.8, 0.9), {1: WHOLE, 2: WHOLE, 3: WHOLE}),
        ((0.7, 0.8, 0.9, 0.6), {0: WHOLE, 1: WHOLE, 2: WHOLE, 3: WHOLE}),  # every survivor, however many
        ((NAN, NAN), {}),
    ],
)
def test_survivors_and_the_three_best_keep_their_weights(
    stage: Stage, tmp_path: Path, scores: Sequence[float], left: dict[int, list[str]]
) -> None:
    assert ended_in_order(stage, tmp_path, scores) == left
    assert sorted(stage.journal.state.weights_kept(0.6)) == sorted(left)


def test_the_end_of_a_trial_does_not_look_at_all_earlier_ones(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    best_row = TrialRecord.best_row
    monkeypatch.setattr(TrialRecord, "best_row", lambda record: looks.append(record.trial) or best_row(record))  # type: ignore[func-returns-value]
    scores = np.random.default_rng(0).uniform(0.0, 0.65, 40).round(2).tolist()  # with ties, and a few survivors
    left = ended_in_order(stage, tmp_path, scores)
    assert len(looks) < 25 * len(scores)  # all trials at each end would be 40 x 41, several times
    assert sorted(stage.journal.state.weights_kept(0.6)) == sorted(left)


def test_it_pickles_as_nothing(stage: Stage) -> None:
    assert stage.callback.__getstate__() == {}


# --- ends without a start, the loop's beat ----------------------------------------------------------------------------


def test_every_step_of_tune_is_handed_on(stage: Stage) -> None:
    for iteration in range(3):
        stage.callback.on_step_end(iteration, [])
    assert stage.heard.names == ["on_step"] * 3


def test_a_trial_that_does_not_start_again_is_ended_once(stage: Stage) -> None:
    trial = FakeTrial(0)
    stage.result(trial, 1, 0.3)
    record = stage.record(trial)
    for _ in range(2):
        stage.callback.end(record, Stop("budget", "enough"))
    assert (record.stop_reason, record.stop_detail) == ("budget", "enough")
    assert stage.heard.names == ["on_epoch", "on_end"]
