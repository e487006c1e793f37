"""The live display: 80 columns, plain lines in a pipe, nothing when quiet."""

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from nkat_ray.report.progress import Progress


def play(run: Any, progress: Progress) -> None:
    """Everything a search would tell the display."""
    with progress:
        progress.on_start(len(run.trials))
        for row in run.trials:
            progress.on_trial_start(row["trial"], {"epochs": 12})
            for result in (point for point in run.curves if point["trial"] == row["trial"]):
                progress.on_result(row["trial"], result)
            if row["passed_gate"]:
                progress.on_survivor(row["trial"])
            progress.on_trial_end(row["trial"], row)
        progress.stage2_start(len(run.stage2))
        for row in run.stage2:
            progress.stage2_done(row["trial"], row["dataset"], row)


def new_progress(console: Console, **options: Any) -> Progress:
    return Progress(name="r", preset="quick", gate=0.29, data="CIFAR-10", epochs=12, console=console, **options)


def test_in_a_pipe_one_plain_line_a_finished_trial(make_run: Callable[..., Any]) -> None:
    run = make_run()
    file = io.StringIO()
    play(run, new_progress(Console(file=file, width=80)))
    text = file.getvalue()
    assert all(char == "\n" or char.isprintable() for char in text)
    ends = re.findall(r"^trial (\d+): (\w+) after", text, re.MULTILINE)
    assert ends == [(str(row["trial"]), row["stop_reason"]) for row in run.trials]
    assert len(re.findall(r"^Stage 2: trial", text, re.MULTILINE)) == len(run.stage2)
    assert "gate 0.29 (the notes' gate is 0.60)" in text


def test_quiet_prints_nothing(make_run: Callable[..., Any]) -> None:
    file = io.StringIO()
    progress = new_progress(Console(file=file), quiet=True)
    play(make_run(), progress)
    progress.notice("hello")
    assert file.getvalue() == ""


def test_live_display_fits_80_columns_at_every_step(make_run: Callable[..., Any]) -> None:
    run = make_run(repeat=3)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    progress = new_progress(console)

    def widest() -> int:
        plain = Console(file=io.StringIO(), width=120)
        plain.print(progress._render())
        return max(map(len, plain.file.getvalue().splitlines()))  # type: ignore[attr-defined]

    progress.on_start(len(run.trials))
    for row in run.trials:
        progress.on_trial_start(row["trial"], {"epochs": 12})
        progress.on_result(row["trial"], {"epoch": 1, "val_accuracy": None, "local_tpe": float("nan")})
        assert widest() <= 80
    play(run, progress)
    assert widest() <= 80


def test_time_left_counts_ended_trials_as_typical(make_run: Callable[..., Any]) -> None:
    now = [0.0]
    progress = new_progress(Console(file=io.StringIO()), clock=lambda: now[0])
    with progress:
        progress.on_start(3)
        progress.on_trial_start(0, {"epochs": 12})
        for epoch in range(1, 5):
            now[0] += 10
            progress.on_result(0, {"epoch": epoch, "val_accuracy": 0.3, "local_tpe": 0.2})
        assert progress.seconds_left() == pytest.approx(10 * (8 + 2 * 12))
        progress.on_trial_end(0, {"stop_reason": "asha", "epochs": 4, "best_local_tpe": 0.2})
        assert progress.seconds_left() == pytest.approx(10 * 2 * 4)


def test_resumed_display_counts_earlier_trials_but_not_their_time() -> None:
    now = [0.0]
    progress = new_progress(Console(file=io.StringIO()), clock=lambda: now[0])
    with progress:
        progress.on_start(2, [{"trial": 0, "stop_reason": "finished", "epochs": 12, "passed_gate": True}])
        now[0] += 5
        progress.on_result(1, {"epoch": 1, "val_accuracy": 0.3, "local_tpe": 0.2})
        assert progress.seconds_left() == pytest.approx(5 * 11)
