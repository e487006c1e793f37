"""The live display and its plain lines: what is shown at each step of a run, and what is estimated."""

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from nkat_ray.config import STAGE1_DATASET, RunConfig
from nkat_ray.data import Dataset, Missing
from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.record import tables
from nkat_ray.report.progress import Progress


def play(run: Any, progress: Progress) -> None:
    """Everything that a run tells its observers."""
    with progress:
        progress.on_stage1_start(len(run.trials))
        for row in run.trials:
            progress.on_trial_start(row["trial"], tables.config_of(row))
            for result in (point for point in run.curves if point["trial"] == row["trial"]):
                progress.on_epoch(row["trial"], result)
            if row["passed_gate"]:
                progress.on_survivor(row["trial"])
            progress.on_trial_end(row["trial"], row)
        survivors = sorted({row["trial"] for row in run.stage2})
        progress.on_stage2_start(survivors, STAGE2_DATASETS)
        for row in run.stage2:
            progress.on_stage2_row({**row, "test_accuracy": None})
        for row in run.stage2:
            progress.on_stage2_row(row)


def new_progress(console: Console, epochs: int = 12, **options: Any) -> Progress:
    config = RunConfig.from_preset("quick", name="r", gate=0.29, epochs=epochs)
    return Progress(config, {}, console=console, **options)


def plain_lines(run: Any) -> str:
    file = io.StringIO()
    play(run, new_progress(Console(file=file, width=80)))
    return file.getvalue()


def frame(progress: Progress, width: int = 200) -> str:
    """What the live display shows now."""
    file = io.StringIO()
    Console(file=file, width=width).print(progress._display.get_renderable())
    return file.getvalue()


def result(epoch: int, accuracy: float | None = 0.3) -> dict[str, Any]:
    return {"epoch": epoch, "val_accuracy": accuracy, "local_tpe": 0.2}


# --- plain lines ------------------------------------------------------------------------------------------------------


def test_in_a_pipe_one_plain_line_per_finished_trial(make_run: Callable[..., Any]) -> None:
    run = make_run()
    text = plain_lines(run)
    assert all(char == "\n" or char.isprintable() for char in text)
    ends = re.findall(r"^trial (\d+): (\w+) after", text, re.MULTILINE)
    assert ends == [(str(row["trial"]), row["stop_reason"]) for row in run.trials]
    assert len(re.findall(r"^Stage 2: trial", text, re.MULTILINE)) == 2 * len(run.stage2)
    assert "gate 0.29 (the notes' gate is 0.60)" in text


# Reported in ultralytics/yolov5#3118, ashleve/lightning-hydra-template#467
def test_a_log_has_sparse_lines_between_a_trials_start_and_its_end(make_run: Callable[..., Any]) -> None:
    text = plain_lines(make_run())
    assert "trial 1 starts: no stem p4 384x5\n" in text
    for trial, epochs in [(0, [1, 3, 6, 9]), (2, [1, 3]), (6, [])]:  # trial 2 ends after three epochs, trial 6 at once
        assert [int(n) for n in re.findall(rf"^trial {trial}: epoch (\d+) of 12", text, re.MULTILINE)] == epochs


def test_an_evaluation_says_what_it_is_and_why_there_is_none(make_run: Callable[..., Any]) -> None:
    lines = plain_lines(make_run(emnist=None)).splitlines()
    assert any(line.startswith("Stage 2: trial 0 on mnist: validation 0.985 | 1 of 24 done") for line in lines)
    assert any(line.startswith("Stage 2: trial 0 on mnist: test 0.985 | 13 of 24 done") for line in lines)
    assert any(line.startswith("Stage 2: trial 0 on emnist_letters: missing: not found: <script>") for line in lines)


def test_at_chance_is_not_called_failed() -> None:
    file = io.StringIO()
    with new_progress(Console(file=file)) as progress:
        progress.on_stage2_start([3], ["mnist"])
        progress.on_stage2_row(
            {"trial": 3, "dataset": "mnist", "status": "failed", "val_accuracy": 0.1, "classes": 10, "error": "..."}
        )
    assert "trial 3 on mnist: validation 0.100, at chance |" in file.getvalue()


def test_quiet_prints_nothing(make_run: Callable[..., Any]) -> None:
    for terminal in (False, True):
        file = io.StringIO()
        progress = new_progress(Console(file=file, quiet=True, force_terminal=terminal))
        play(make_run(f"run-{terminal}"), progress)
        progress.on_notice("hello")
        assert file.getvalue() == ""


# Reported in Textualize/rich#2929
@pytest.mark.parametrize("kind", ["a pipe", "a notebook", "a dumb terminal"])
def test_nothing_is_repainted_where_no_terminal_is(
    kind: str, make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    environment = {"TERM": "dumb" if kind == "a dumb terminal" else "xterm"}
    if kind == "a notebook":  # `!python tune_round2.py`: a pseudo-terminal whose every frame is kept
        monkeypatch.setenv("JPY_PARENT_PID", "1")
    file = io.StringIO()
    console = Console(file=file, force_terminal=kind != "a pipe", color_system=None, _environ=environment)
    play(make_run(), new_progress(console))
    assert "\x1b" not in file.getvalue()
    assert "trial 0: epoch 3 of 12" in file.getvalue()


# --- the live display -------------------------------------------------------------------------------------------------


def test_on_a_terminal_lines_about_header_notes_and_ended_trials_stay(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    run, file = make_run(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None, _environ={"TERM": "xterm"})
    progress = new_progress(console)
    with progress:
        progress.on_notice("two trials at a time")
        play(run, progress)
    text = file.getvalue()
    assert "\x1b[" in text  # it repaints
    for line in ("r  preset quick  gate 0.29", "note: two trials at a time", "trial 2: asha after 3 epochs"):
        assert line in text
    assert "starts" not in text  # the display shows that


def test_the_display_is_never_blank() -> None:
    progress = new_progress(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"}))
    with progress:
        assert "preparing" in frame(progress)
        progress.on_stage1_start(3)
        assert re.search(r"Stage 1 .*0/3 trials", frame(progress))
        assert "starting workers" in frame(progress)
        progress.on_trial_start(0, {"conv_stem": "small", "depth": 4})
        assert re.search(r"trial 0 .*small p4 64x4 +starting", frame(progress))
        assert "starting workers" not in frame(progress)
        progress.on_epoch(0, result(1))
        assert re.search(r"trial 0 .*1/12 epochs +small p4 64x4 +accuracy 0.300  TPE 0.200", frame(progress))
        assert "passed" not in frame(progress)
        progress.on_survivor(0)
        assert "passed" in frame(progress)
        progress.on_trial_end(0, {"stop_reason": "finished", "epochs": 12, "best_local_tpe": 0.4, "passed_gate": True})
        assert "trial 0" not in frame(progress).replace("(trial 0)", "")
        assert "finished 1  survivors 1  best Local TPE 0.400 (trial 0)" in frame(progress)


# --- the estimate -----------------------------------------------------------------------------------------------------


def test_time_left_counts_ended_trials_as_typical() -> None:
    now = [0.0]
    progress = new_progress(Console(file=io.StringIO()), clock=lambda: now[0])
    with progress:
        progress.on_stage1_start(3)
        now[0] = 50.0  # the first workers take their time, which no later trial does
        progress.on_trial_start(0, {})
        for epoch in range(1, 5):
            now[0] += 10
            progress.on_epoch(0, result(epoch))
        assert progress.seconds_left() == pytest.approx(10 * (8 + 2 * 12))
        progress.on_trial_end(0, {"stop_reason": "asha", "epochs": 4, "best_local_tpe": 0.2})
        assert progress.seconds_left() == pytest.approx(10 * 2 * 4)


def test_resumed_display_counts_earlier_trials_but_not_their_time() -> None:
    now = [0.0]
    progress = new_progress(Console(file=io.StringIO()), clock=lambda: now[0])
    with progress:
        progress.on_stage1_start(2, [{"trial": 0, "stop_reason": "finished", "epochs": 12, "passed_gate": True}])
        now[0] += 5
        progress.on_epoch(1, result(1))
        assert progress.seconds_left() == pytest.approx(5 * 11)


def dataset(name: str) -> Dataset:
    return Dataset(
        name=name, class_names=tuple("abcdefghij"), grey=False, flip=True, source="made up", digest="sha256:0",
        verified=True, sizes={"train": 50_000, "test": 10_000}, reader=None,  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_header_says_where_the_images_come_from() -> None:
    file = io.StringIO()
    datasets = {"cifar10": dataset("cifar10"), "mnist": Missing("mnist", "not in /data")}
    with Progress(RunConfig.from_preset("quick", name="r"), datasets, console=Console(file=file)):
        pass
    assert file.getvalue().splitlines()[1:] == ["data: cifar10: made up", "data: mnist: missing: not in /data"]


def test_one_estimate_covers_both_stages() -> None:
    config = RunConfig.from_preset(
        "quick", name="r", epochs=4, train_images=4000, transfer_images=2000, transfer_epochs=2
    )
    datasets = {name: dataset(name) for name in (STAGE1_DATASET, "mnist", "leaves")}
    now = [0.0]
    progress = Progress(config, datasets, console=Console(file=io.StringIO()), clock=lambda: now[0])
    with progress:
        progress.on_stage1_start(1)
        now[0] = 10.0
        progress.on_epoch(0, result(1))
        progress.on_survivor(0)
        stage1 = 10.0 * 3
        assert progress.seconds_left() > stage1 + 10.0 * 2.0  # at least the one survivor's Stage 2
        progress.on_trial_end(0, {"stop_reason": "finished", "epochs": 4, "passed_gate": True})
        assert progress.seconds_left() == pytest.approx(10.0 * 2.0)
        progress.on_stage2_start([0], list(datasets))
        now[0] = 15.0
        assert 0 < progress.seconds_left() < 30.0
        row = {"trial": 0, "status": "ok", "val_accuracy": 0.5, "classes": 10}
        progress.on_stage2_row({**row, "dataset": "mnist"})
        assert progress.seconds_left() == pytest.approx(5.0 * (1 + 4 * 0.1))  # one more transfer, four scorings
        progress.on_stage2_row({**row, "dataset": "leaves"})
        for name in (STAGE1_DATASET, *datasets):
            progress.on_stage2_row({**row, "dataset": name})
        assert progress.seconds_left() == 0.0
