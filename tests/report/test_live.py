"""The live display's bars and grid, within the width that there is."""

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.report.live import SHOWN, WIDTH, Cells, LiveDisplay, survivors_grid
from nkat_ray.report.tally import Evaluations

SCORES = "accuracy 0.569  TPE 0.418  passed"


def drawn(shown: Any, width: int = 200) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(shown)
    return file.getvalue()


def display(width: int, trials: int) -> LiveDisplay:
    """Stage 1 with so many running trials."""
    made = LiveDisplay(Console(file=io.StringIO(), width=width), lambda: "12:38, about 5:28:51 left", live=False)
    made.add_task("Stage 1", total=50, completed=3, cells=Cells("trials"))
    for trial in range(trials):
        made.add_task(f"trial {trial}", total=40, completed=12, cells=Cells("epochs", "no stem p4 384x5", SCORES))
    return made


@pytest.mark.parametrize("width", [80, 100, 140, 300])
def test_nothing_is_cut_and_nothing_is_wider_than_it_may_be(width: int) -> None:
    text = drawn(display(width, SHOWN).get_renderable(), width)
    assert max(map(len, text.splitlines())) <= min(width, WIDTH)
    for part in (SCORES, "12/40 epochs", "no stem p4 384x5", "3/50 trials", "12:38, about 5:28:51 left"):
        assert part in text


def test_beyond_a_dozen_running_trials_are_a_count() -> None:
    lines = drawn(display(100, 30).get_renderable()).splitlines()
    assert len(lines) == 1 + SHOWN + 1
    assert lines[-1].strip() == "and 18 more trials"


def test_what_the_run_waits_for_stands_below_the_bars() -> None:
    shown = display(100, 0)
    shown.phase, shown.state = "starting workers", "survivors 0"
    assert re.search(r"Stage 1 .*\n.*starting workers\s+survivors 0", drawn(shown.get_renderable()))


def test_stage2_is_a_grid_of_survivors_and_datasets(make_run: Callable[..., Any]) -> None:
    rows = {(row["trial"], row["dataset"]): row for row in make_run(emnist=None).stage2}
    stage2 = Evaluations([0, 5], [*STAGE2_DATASETS, "leaves"], began=0.0)
    for trial, name, tested in [(0, "mnist", True), (5, "mnist", False), (0, "emnist_letters", True)]:
        stage2.add(rows[trial, name] if tested else {**rows[trial, name], "test_accuracy": None})
    text = drawn(survivors_grid(stage2))
    assert re.search(r"trial +MNIST +Fashion-MNIST +EMNIST letters +CIFAR-10 +leaves", text)
    assert re.search(r"^0 +test 0.985 +waiting +missing +waiting +waiting", text, re.MULTILINE)
    assert re.search(r"^5 +validation 0.985 +waiting", text, re.MULTILINE)


def test_finished_survivors_make_room_for_the_others() -> None:
    stage2 = Evaluations(list(range(30)), ["mnist"], began=0.0)
    for _ in range(2):
        stage2.add({"trial": 0, "dataset": "mnist", "status": "ok", "test_accuracy": 0.9})
    lines = drawn(survivors_grid(stage2)).splitlines()
    assert [line.split()[0] for line in lines] == ["trial", *map(str, range(1, SHOWN + 1)), "and"]
    assert lines[-1].strip() == "and 18 more"
