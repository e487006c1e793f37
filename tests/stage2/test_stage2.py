"""The order of Stage 2, and what a killed driver leaves; tasks run in this process."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.files import BEST_FOLDER, JOURNAL_FILE, WEIGHTS_FILE
from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.record.journal import Journal
from nkat_ray.record.run import Run
from nkat_ray.record.scoring import rank
from nkat_ray.search.vault import deposit
from nkat_ray.stage2.stage2 import Stage2

Rows = dict[tuple[int, str], dict[str, Any]]
SURVIVORS = (0, 1)
EVENTS = 2 * len(SURVIVORS) * len(STAGE2_DATASETS) + 1  # rows of validation, the ranking, rows of the test


@pytest.fixture
def evaluate(
    sent: list[str], vault: Any, cluster: Any, heard: Any, survivor: Any, payload: bytes
) -> Callable[..., int]:
    """Takes two survivors through Stage 2 of a run; returns the winner."""

    def go(run: Run) -> int:
        for trial in SURVIVORS:
            deposit(vault, trial, 0.5, payload)
        stage2 = Stage2(run, cluster=cluster, vault=vault, observer=heard)
        return stage2.evaluate([survivor(trial) for trial in SURVIVORS])

    return go


def kinds(folder: Path) -> list[str]:
    """Return the kinds of Stage 2's events in a run's journal, in order."""
    events = [json.loads(line)["event"] for line in (folder / JOURNAL_FILE).read_text().splitlines()]
    return [kind for kind in events if kind in ("stage2", "ranked", "tested")]


def figures(rows: Rows) -> Rows:
    """Return rows without where and how long."""
    return {
        key: {name: value for name, value in row.items() if name not in ("node", "seconds")}
        for key, row in sorted(rows.items())
    }


def test_all_are_validated_then_ranked_and_only_then_are_test_images_read(
    evaluate: Any, make_run: Any, datasets: Any, tmp_path: Path, heard: Any, payload: bytes
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Watched:
        reader: Any

        def load(self, split: str, rows: Any = None) -> Any:
            if split == "test":
                assert run.state.order, "test images were read before the ranking was fixed"
            return self.reader.load(split, rows)

        def labels(self, split: str) -> Any:
            return self.reader.labels(split)

    watched = {name: dataclasses.replace(dataset, reader=Watched(dataset.reader)) for name, dataset in datasets.items()}
    run = make_run(tmp_path / "run", watched)
    winner = evaluate(run)
    assert kinds(run.folder) == ["stage2"] * 8 + ["ranked"] + ["tested"] * 8
    assert run.state.order == rank(run.state.stage2.values(), {})
    assert winner == run.state.order[0]
    assert heard.starts == [([0, 1], list(STAGE2_DATASETS), [])]
    assert heard.rows == [*run.state.stage2.values(), *run.state.tested.values()]
    assert (run.folder / BEST_FOLDER / WEIGHTS_FILE).read_bytes() == payload


class Killed(BaseException):
    """The driver dies here."""


@pytest.mark.parametrize("survived", [0, 3, 7, 8, 9, 12, EVENTS - 1])
def test_a_killed_driver_loses_nothing_that_was_finished(
    evaluate: Any, make_run: Any, sent: list[str], tmp_path: Path, heard: Any, monkeypatch: pytest.MonkeyPatch,
    survived: int,
) -> None:  # fmt: skip
    whole = make_run(tmp_path / "whole")
    winner = evaluate(whole)
    killed, write = make_run(tmp_path / "run"), Journal.write

    def dying(journal: Journal, kind: str, **fields: Any) -> None:
        if len(kinds(killed.folder)) == survived:
            raise Killed
        write(journal, kind, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", dying)
        with pytest.raises(Killed):
            evaluate(killed)
    assert len(kinds(killed.folder)) == survived
    killed.journal.close()

    sent.clear()
    run = make_run(tmp_path / "run")
    done = [*run.state.stage2.values(), *run.state.tested.values()]
    assert evaluate(run) == winner
    assert len(sent) == EVENTS - 1 - len(done)  # nothing that is in the journal is done again
    assert len(heard.starts[-1][2]) == len(done)
    assert kinds(run.folder) == kinds(whole.folder)
    assert figures(run.state.stage2) == figures(whole.state.stage2)
    assert figures(run.state.tested) == figures(whole.state.tested)
    assert run.state.order == whole.state.order
    for path in (whole.folder / BEST_FOLDER).iterdir():
        assert (run.folder / BEST_FOLDER / path.name).read_bytes() == path.read_bytes()


def test_a_validation_of_which_a_worker_died_is_tried_again_until_the_ranking_is_fixed(
    evaluate: Any, make_run: Any, sent: list[str], tmp_path: Path
) -> None:
    broken = {"trial": 0, "dataset": "mnist", "classes": 10, "status": "failed", "error": "lost", "val_accuracy": None}
    before = make_run(tmp_path / "before")
    before.journal.write("stage2", row=broken, epoch=1)
    evaluate(before)
    assert sent.count("transfer_weights") == 8
    assert before.state.stage2[0, "mnist"]["n_val"] == 20
    sent.clear()
    before.journal.write("stage2", row=broken, epoch=1)
    evaluate(before)
    assert sent == []
    assert before.state.stage2[0, "mnist"] == broken


# --- after `--feedback global` ----------------------------------------------------------------------------------------


def test_rows_of_the_final_weights_stand_and_others_are_made_again(
    sent: list[str], make_run: Any, vault: Any, cluster: Any, heard: Any, payload: bytes, tmp_path: Path
) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(payload)
    run = make_run(tmp_path / "run")

    def report(trial: int, epoch: int, score: float) -> None:
        row = {"epoch": epoch, "local_tpe": score, "val_accuracy": score, "nkat_parameters": 4, "parameters": 1000}
        run.journal.write("result", trial=trial, row=row, checkpoint=str(tmp_path))

    stage2 = Stage2(run, cluster=cluster, vault=vault, observer=heard)
    for trial, score in ((0, 0.5), (1, 0.5), (2, 0.05)):  # the gate is 0.1
        run.journal.write("proposed", trial=trial, params={}, seed=0, study_number=trial)
        report(trial, 1, score)
    for trial in SURVIVORS:
        stage2.validation.submit(run.state.trials[trial])
        while stage2.validation.tasks:
            stage2.validation.collect(wait=True)
    report(1, 2, 0.6)
    sent.clear()
    assert stage2.run() == run.state.order[0]
    assert sent == ["transfer_weights"] * 4 + ["count_on_test"] * 8
    assert {trial: epoch for (trial, _), epoch in run.state.stage2_epochs.items()} == {0: 1, 1: 2}
    assert sorted(run.state.order) == [0, 1]
    (start,) = heard.starts
    assert {row["trial"] for row in start[2]} == {0}
