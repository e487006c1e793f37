"""Stage 1 for real: trials of two epochs of a tiny network, one at a time, in Ray's processes."""

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from nkat_ray.cluster.resources import Cluster, Node
from nkat_ray.config import RunConfig
from nkat_ray.files import JOURNAL_FILE, STUDY_FILE, WEIGHTS_FILE
from nkat_ray.metrics import ATTENTION_ENTROPY, NKAT_PREFIX
from nkat_ray.record.journal import Journal, RunState, TrialRecord, read_state
from nkat_ray.record.observer import Observer
from nkat_ray.record.requests import request_stop
from nkat_ray.record.run import Run
from nkat_ray.record.storage import RunStorage
from nkat_ray.search import scheduler
from nkat_ray.search import stage1 as module
from nkat_ray.search.recorder import ROW_KEYS
from nkat_ray.search.scheduler import ResumableASHA
from nkat_ray.search.searcher import STUDY_NAME, trial_seed
from nkat_ray.search.vault import withdraw
from nkat_ray.signals import Interrupted, Interruption
from nkat_ray.space import baseline_point, round1_point, space_of
from nkat_ray.train.checkpoint import Weights, load_state

COMPLETE, PRUNED, FAIL = (getattr(optuna.trial.TrialState, name) for name in ("COMPLETE", "PRUNED", "FAIL"))


class Heard(Observer):
    """Keeps the names of the events and their trials; acts on an epoch as it is told to."""

    def __init__(self, on_epoch: Callable[[int], None] = lambda trial: None) -> None:
        self.events: list[tuple[str, int]] = []
        self.notices: list[str] = []
        self._on_epoch = on_epoch

    def on_trial_start(self, trial: int, params: Any) -> None:
        self.events.append(("on_trial_start", trial))

    def on_epoch(self, trial: int, row: Any) -> None:
        self.events.append(("on_epoch", trial))
        self._on_epoch(trial)

    def on_survivor(self, trial: int) -> None:
        self.events.append(("on_survivor", trial))

    def on_trial_end(self, trial: int, row: Any) -> None:
        self.events.append(("on_trial_end", trial))

    def on_notice(self, text: str) -> None:
        self.notices.append(text)


@dataclass
class Stage1:
    """A run's folder and what is needed to tune in it, as often as one likes."""

    folder: Path
    run: RunConfig
    fixed: tuple[str, ...]
    data: Any
    vault: Any

    def tune(self, observer: Observer | None = None, interruption: Interruption | None = None) -> RunState:
        self.folder.mkdir(exist_ok=True)
        journal = Journal(self.folder)
        journal.write("run")
        run = Run(
            config=self.run, domains=space_of(self.run, self.fixed).domains, datasets={}, journal=journal,
            storage=RunStorage(self.folder, None),
        )  # fmt: skip
        cluster = Cluster((Node(cpus=2),))
        try:
            module.Stage1(
                run, self.data, cluster=cluster, vault=self.vault, observer=observer or Observer(),
                interruption=interruption,
            ).run()  # fmt: skip
        finally:
            journal.close()
        return journal.state

    def study(self) -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(self.folder / STUDY_FILE)))
        return optuna.load_study(study_name=STUDY_NAME, storage=storage)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / JOURNAL_FILE).read_text().splitlines()]

    def forget(self, *forgotten: Callable[[dict[str, Any]], bool]) -> None:
        """Take events out of the journal: what a kill at that moment would have left."""
        kept = [event for event in self.events() if not any(forget(event) for forget in forgotten)]
        (self.folder / JOURNAL_FILE).write_text("".join(json.dumps(event) + "\n" for event in kept))


@dataclass
class Whole:
    """Three trials that nothing disturbed."""

    stage: Stage1
    state: RunState
    told: list[tuple[str, int]]


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, tiny_run: Callable[..., Any], tiny_fixed: Any, tiny_data: Any, vault: Any
) -> Callable[..., Stage1]:
    """Makes a Stage 1 in a new folder; options are the run's."""
    return lambda **changes: Stage1(tmp_path_factory.mktemp("run"), tiny_run(**changes), tiny_fixed, tiny_data, vault)


@pytest.fixture(scope="module")
def whole(make: Callable[..., Stage1]) -> Whole:
    stage, heard = make(seed=3, grace=2), Heard()  # ASHA judges at the last epoch alone: every trial has two

    state = stage.tune(heard)
    return Whole(stage, state, heard.events)


def outcome(record: TrialRecord) -> dict[str, Any]:
    """Everything of a trial but times, places and names."""
    times = {"epoch_s", "started_s", "images_per_s"}
    return {
        "params": record.params, "seed": record.seed, "reason": record.stop_reason,
        "curve": {epoch: {k: v for k, v in row.items() if k not in times} for epoch, row in record.curve.items()},
    }  # fmt: skip


def outcomes(state: RunState) -> dict[int, dict[str, Any]]:
    return {number: outcome(record) for number, record in sorted(state.trials.items())}


# --- three trials from first to last ----------------------------------------------------------------------------------


def test_every_trial_ends_with_a_reason_and_its_curve(whole: Whole) -> None:
    assert sorted(whole.state.trials) == [0, 1, 2]
    for record in whole.state.trials.values():
        assert (record.stop_reason, sorted(record.curve)) == ("finished", [1, 2])
        assert record.stop_detail
        for row in record.curve.values():
            of_blocks = {key for key in row if key.startswith((ATTENTION_ENTROPY, NKAT_PREFIX))}
            assert len(of_blocks) == 5 * whole.stage.run.depth  # the entropy and four NKAT scalars
            assert set(row) - of_blocks == set(ROW_KEYS)
            assert 0 <= row["local_tpe"] == pytest.approx(row["val_accuracy"] / math.log10(1 + row["lambda_theory"]))
            assert (row["cpus"], row["gpus"]) == (1, 0)


def test_the_journal_says_the_same_afterwards(whole: Whole) -> None:
    assert outcomes(read_state(whole.stage.folder)) == outcomes(whole.state)
    assert whole.state.stage1_done
    assert [number for _, number in whole.state.slot_changes] == [1]
    kinds = [event["event"] for event in whole.stage.events()]
    assert kinds[:5] == ["run", "warmed", "slots", "proposed", "started"]
    assert kinds[-1] == "stage1_done"
    assert kinds.count("proposed") == kinds.count("started") == kinds.count("end") == 3


def test_the_first_trials_are_the_two_points(whole: Whole) -> None:
    run = whole.stage.run
    space = space_of(run, whole.stage.fixed).domains
    assert whole.state.trials[0].params == baseline_point(run, space)
    assert whole.state.trials[1].params == round1_point(run, space)[0]
    assert [r.seed for r in whole.state.trials.values()] == [trial_seed(3, number) for number in range(3)]


def test_listeners_hear_of_everything_in_order(whole: Whole) -> None:
    for number in whole.state.trials:
        heard = [name for name, trial in whole.told if trial == number]
        assert heard == ["on_trial_start", "on_epoch", "on_survivor", "on_epoch", "on_trial_end"]
    assert [trial for name, trial in whole.told if name == "on_trial_end"] == [0, 1, 2]


def test_every_trial_is_reported_to_the_study(whole: Whole) -> None:
    trials = whole.stage.study().trials
    assert len(trials) == 3
    for frozen, record in zip(trials, whole.state.trials.values(), strict=True):
        best = record.best_row()
        assert best is not None
        assert (frozen.params, frozen.state, frozen.value) == (record.params, COMPLETE, best["local_tpe"])
        assert frozen.intermediate_values == {epoch: row["local_tpe"] for epoch, row in record.curve.items()}
        assert frozen.user_attrs["stop_reason"] == record.stop_reason


def test_survivors_weights_are_in_the_vault_and_on_disk(whole: Whole, ray_local: Any) -> None:
    assert whole.state.survivors(whole.stage.run.gate) == [0, 1, 2]
    for number, record in whole.state.trials.items():
        reference = withdraw(whole.stage.vault, number)
        assert reference is not None
        payload = ray_local.get(reference)
        newest = Path(record.checkpoints[-1])
        assert (newest / WEIGHTS_FILE).read_bytes() == payload
        weights, best = Weights.from_bytes(payload), record.best_row()
        assert best is not None
        assert (weights.epoch, weights.val_accuracy, weights.seed) == (best["epoch"], best["val_accuracy"], record.seed)
        weights.build()
        assert load_state(newest)["trainer"]["epoch"] == max(record.curve)


def test_tune_keeps_two_checkpoints_a_trial(whole: Whole) -> None:
    kept = [len(list(folder.glob("checkpoint_*"))) for folder in (whole.stage.folder / "tune").glob("*/trial_000?")]
    assert len(kept) == 3
    assert max(kept) <= 2


# --- the same seed, a finished run, no time ---------------------------------------------------------------------------


@pytest.mark.slow  # what is proposed: test_searcher; what is trained: the interrupted stage below
def test_the_same_seed_gives_the_same_trials_and_scores(whole: Whole, make: Callable[..., Stage1]) -> None:
    assert outcomes(make(seed=3, grace=2).tune()) == outcomes(whole.state)


def test_a_finished_stage_is_not_done_again(whole: Whole, tmp_path: Path) -> None:
    folder = shutil.copytree(whole.stage.folder, tmp_path / "copy")
    stage = Stage1(folder, whole.stage.run, whole.stage.fixed, whole.stage.data, whole.stage.vault)
    clock = time.perf_counter()
    assert outcomes(stage.tune()) == outcomes(whole.state)
    assert time.perf_counter() - clock < 5
    assert len(stage.study().trials) == 3


def test_without_time_nothing_is_begun(make: Callable[..., Stage1]) -> None:
    state = make(stage1_hours=1e-9).tune()
    assert state.trials == {}
    assert state.stage1_done


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_interrupted_stage_goes_on_where_it_was(
    whole: Whole, make: Callable[..., Stage1], monkeypatch: pytest.MonkeyPatch
) -> None:
    rungs: list[dict[float, dict[str, float]]] = []

    class Watched(ResumableASHA):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            rungs.append(self.rungs())

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
            super().on_trial_complete(tune_controller, trial, result)
            rungs[-1] = self.rungs()

    def interrupt(trial: int) -> None:
        if trial == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(scheduler, "ResumableASHA", Watched)
    stage = make(seed=3, grace=2)
    with Interruption() as interruption, pytest.raises(Interrupted):
        stage.tune(Heard(interrupt), interruption)
    between = read_state(stage.folder)
    assert [record.ended for record in between.trials.values()] == [True, False]
    assert sorted(between.trials[1].curve) == [1]

    state = stage.tune()
    assert outcome(state.trials[0]) == outcome(whole.state.trials[0])
    assert outcome(state.trials[1]) == outcome(whole.state.trials[1])  # bit for bit from its checkpoint
    assert sorted(state.trials) == [0, 1, 2]
    assert all(record.ended for record in state.trials.values())
    assert state.trials[0].curve[1]["started_s"] == between.trials[0].curve[1]["started_s"]  # not trained again
    assert state.trials[1].curve[1]["started_s"] == between.trials[1].curve[1]["started_s"]
    starts = [event["trial"] for event in stage.events() if event["event"] == "started"]
    assert starts == [0, 1, 1, 2]
    assert len(rungs) == 2
    assert list(rungs[0][2].values()) == [between.trials[0].curve[2]["local_tpe"]]
    assert rungs[1][2]["trial-0"] == between.trials[0].curve[2]["local_tpe"]
    assert sorted(rungs[1][2].values()) == sorted(record.curve[2]["local_tpe"] for record in state.trials.values())
    assert all(trial.state.is_finished() for trial in stage.study().trials)
    assert state.stage1_done


def test_what_an_earlier_driver_left_undone_ends_when_the_time_is_used_up(whole: Whole, tmp_path: Path) -> None:
    """Trial 0 has had its last epoch, and only its end was not written any more; trial 1 has an epoch left to train."""
    folder = shutil.copytree(whole.stage.folder, tmp_path / "copy")
    run = dataclasses.replace(whole.stage.run, stage1_hours=1e-9, num_samples=9)
    stage = Stage1(folder, run, whole.stage.fixed, whole.stage.data, whole.stage.vault)
    stage.forget(
        lambda event: event["event"] == "stage1_done",
        lambda event: event["event"] == "end" and event["trial"] in (0, 1),
        lambda event: event["event"] == "result" and event["trial"] == 1 and event["row"]["epoch"] == 2,
    )
    state = stage.tune()
    assert sorted(state.trials) == [0, 1, 2]  # nothing new is begun
    assert outcome(state.trials[0]) == outcome(whole.state.trials[0])
    assert state.trials[0].curve[2]["started_s"] == whole.state.trials[0].curve[2]["started_s"]
    assert (state.trials[1].stop_reason, sorted(state.trials[1].curve)) == ("budget", [1])
    assert state.stage1_done


# Asked for in ray-project/ray#4355
def test_a_trial_that_the_user_stops_ends_inside_its_epoch_and_stays_a_survivor(make: Callable[..., Stage1]) -> None:
    """Its epochs are without end: it is stopped after its first one, while it trains."""
    epochs = 10_000
    stage = make(num_samples=2, epochs=epochs, grace=epochs, max_failures=2)
    heard = Heard(lambda trial: request_stop(stage.folder, trial))
    state = stage.tune(heard)
    for number in (0, 1):
        record = state.trials[number]
        assert (record.stop_reason, record.stop_detail, record.error) == ("user", "stopped with nkat stop", None)
        assert record.passed(stage.run.gate)
        assert record.best_score == max(row["local_tpe"] for row in record.curve.values())
        assert Path(record.checkpoints[-1]).is_dir()
        assert withdraw(stage.vault, number) is not None
    assert [trial.state for trial in stage.study().trials] == [COMPLETE, COMPLETE]
    assert not any("retried" in text for text in heard.notices)
    assert not (stage.folder / "stop").exists()
    assert state.stage1_done


def test_a_request_that_an_earlier_driver_did_not_fulfil_ends_the_trial_without_training(
    whole: Whole, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole.stage.folder, tmp_path / "copy")
    stage = Stage1(folder, whole.stage.run, whole.stage.fixed, whole.stage.data, whole.stage.vault)
    stage.forget(
        lambda event: event["event"] == "stage1_done",
        lambda event: event["event"] == "end" and event["trial"] == 2,
        lambda event: event["event"] == "result" and event["trial"] == 2 and event["row"]["epoch"] == 2,
    )
    request_stop(folder, 2)
    state = stage.tune()
    assert (state.trials[2].stop_reason, sorted(state.trials[2].curve)) == ("user", [1])
    assert [event["trial"] for event in stage.events() if event["event"] == "started"] == [0, 1, 2]  # not again
    assert not (folder / "stop").exists()


@pytest.mark.slow
def test_a_trial_that_raises_is_tried_again_from_its_checkpoint_and_harms_no_other(
    whole: Whole, make: Callable[..., Stage1], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Trial 0 raises once after its first epoch, 1 each time, 2 is well."""
    marker = str(tmp_path / "raised")

    def breaking(params: dict[str, Any], **given: Any) -> None:
        from pathlib import Path
        from unittest import mock

        from nkat_ray.search import trainable

        report = trainable.tune.report

        def report_and_raise(row: dict[str, Any], **more: Any) -> None:
            report(row, **more)
            if params["trial"] == 0 and not Path(marker).exists():
                Path(marker).touch()
                raise RuntimeError("once")

        if params["trial"] == 1:
            raise RuntimeError("each time")
        with mock.patch.object(trainable.tune, "report", report_and_raise):
            trainable.train_trial(params, **given)

    monkeypatch.setattr(module, "train_trial", breaking)
    stage, heard = make(seed=3, grace=2, max_failures=1, epochs=2), Heard()
    state = stage.tune(heard)
    assert Path(marker).exists()
    assert outcome(state.trials[0]) == outcome(whole.state.trials[0])  # from its checkpoint, bit for bit
    assert outcome(state.trials[2]) == outcome(whole.state.trials[2])
    assert (state.trials[1].stop_reason, state.trials[1].error) == ("error", "RuntimeError: each time")
    assert state.trials[1].stop_detail == "RuntimeError: each time"
    assert heard.notices[0] == "trial 0 is retried after an error: RuntimeError: once"
    assert [event["trial"] for event in stage.events() if event["event"] == "started"] == [0, 0, 1, 1, 2]
    assert [trial.state for trial in stage.study().trials] == [COMPLETE, FAIL, COMPLETE]
    assert state.stage1_done


# --- what goes wrong from the first trial on --------------------------------------------------------------------------


class Failing(NamedTuple):
    """Tune's trial as the recorder sees it: its number, and the file with its errors."""

    trial_id: str
    config: dict[str, int]
    error_file: str
    last_result: dict[str, Any] = {}  # noqa: RUF012  nobody changes it


@pytest.fixture
def open_stage(tmp_path: Path, tiny_run: Callable[..., Any], tiny_fixed: Any) -> Iterator[Callable[..., module.Stage1]]:
    """Opens a driver's Stage 1 on one folder, as often as one likes, without Ray; options are the run's."""
    with contextlib.ExitStack() as stack:

        def make(**changes: Any) -> module.Stage1:
            run, journal = tiny_run(num_samples=9, **changes), Journal(tmp_path)
            stack.callback(journal.close)
            journal.write("run")
            opened = Run(
                config=run, domains=space_of(run, tiny_fixed).domains, datasets={}, journal=journal,
                storage=RunStorage(tmp_path, None),
            )  # fmt: skip
            return module.Stage1(opened, None, cluster=Cluster((Node(cpus=2),)), vault=None, observer=Observer())

        yield make


def fail(stage: module.Stage1, folder: Path) -> None:
    """Let the next trial be proposed and raise an error, as Tune's controller tells searcher and recorder."""
    proposal = stage._searcher.suggest("t")
    assert isinstance(proposal, dict)
    errors = folder / "error.txt"
    errors.write_text(f"Traceback of trial {proposal['trial']}\nRuntimeError: no {proposal['trial']}\n")
    stage._recorder.on_trial_error(0, [], Failing("t", proposal, str(errors)))  # type: ignore[arg-type]
    stage._recorder.on_step_end(0, [])


def test_a_run_whose_first_trials_all_fail_ends_with_the_first_error_and_its_traceback(
    open_stage: Callable[..., module.Stage1], tmp_path: Path
) -> None:
    stage = open_stage(max_failed=3)
    fail(stage, tmp_path)
    fail(stage, tmp_path)
    with pytest.raises(RuntimeError, match=r"^3 trials have failed .* of trial 0: RuntimeError: no 0;") as raised:
        fail(stage, tmp_path)
    assert "Traceback of trial 0" in str(raised.value.__cause__)
    assert all(trial.state is FAIL for trial in stage._searcher.study.trials)  # Optuna knows of the last one, too


def test_failures_before_a_resume_count_and_the_resume_itself_may_try(
    open_stage: Callable[..., module.Stage1], tmp_path: Path
) -> None:
    fail(open_stage(max_failed=2), tmp_path)
    with pytest.raises(RuntimeError, match="2 trials have failed"):
        fail(open_stage(max_failed=2), tmp_path)
    again = open_stage(max_failed=2)
    again._recorder.on_step_end(0, [])
    with pytest.raises(RuntimeError, match="3 trials have failed"):
        fail(again, tmp_path)


def test_failures_end_no_run_that_is_over_anyway_or_that_sets_no_limit(
    open_stage: Callable[..., module.Stage1], tmp_path: Path
) -> None:
    stage = open_stage(max_failed=9)
    for _ in range(9):
        fail(stage, tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    stage = open_stage(max_failed=None)
    for _ in range(9):
        fail(stage, tmp_path)
