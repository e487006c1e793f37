import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.cli import tune
from nkat_ray.config import RunConfig
from nkat_ray.record import tables
from nkat_ray.record import warm_start as module
from nkat_ray.record.journal import Journal
from nkat_ray.record.run import Run
from nkat_ray.record.storage import RunStorage, run_storage
from nkat_ray.record.summary import write_tables
from nkat_ray.record.warm_start import read_earlier
from nkat_ray.search.searcher import GatedOptunaSearch
from nkat_ray.space import space_of

NAN = math.nan
CURVES = [
    ([0.5, 0.7], "finished"), ([0.3, 0.4], "gate"), ([0.2], "asha"), ([NAN], "nan"), ([0.65], "asha"), ([0.1], None),
]  # fmt: skip


def write_run(storage_path: Path, name: str = "round1", **changes: Any) -> RunConfig:
    """A run's folder as an interrupted run leaves it: six trials, the last of which has not ended."""
    run = RunConfig(**{"name": name, "storage_path": str(storage_path), "gate": 0.6, **changes})
    folder = run_storage(str(storage_path), name).local
    folder.mkdir(parents=True)
    content = {**tables.plain(dataclasses.asdict(run)), "fixed": [], "found": {"cifar10": {"source": "parquet"}}}
    (folder / "config.json").write_text(json.dumps(content))
    journal = Journal(folder)
    journal.write("run")
    searcher = GatedOptunaSearch(
        Run(
            config=dataclasses.replace(run, num_samples=9, seed=5), domains=space_of(run).domains, datasets={},
            storage=RunStorage(folder, None), journal=journal,
        )
    )  # fmt: skip
    for scores, reason in CURVES:
        proposal = searcher.suggest("x")
        assert isinstance(proposal, dict)
        trial = proposal["trial"]
        for epoch, score in enumerate(scores, start=1):
            row = {"epoch": epoch, "local_tpe": score, "val_accuracy": score, "lambda_theory": 21.0, "epoch_s": 1.0}
            row |= {"train_loss": 1.0, "lr": 0.1, "images_per_s": 1.0, "started_s": 0.0}
            journal.write("result", trial=trial, row=row, checkpoint=None)
        if reason is not None:
            journal.write("end", trial=trial, stop_reason=reason, stop_detail=None, error=None)
            searcher.tell(journal.state.trials[trial])
    for trial, value in ((0, 0.6), (4, NAN)):
        row = dict.fromkeys(tables.STAGE2_SCHEMA.names)
        status = "ok" if math.isfinite(value) else "failed"
        row |= {"trial": trial, "dataset": "mnist", "classes": 10, "status": status, "mode": "finetune"}
        journal.write("stage2", row={**row, "val_accuracy": 0.8, "val_tpe": value} if status == "ok" else row)
    write_tables(folder, run, journal.state)
    journal.close()
    return run


@pytest.fixture
def earlier(tmp_path: Path) -> RunConfig:
    return write_run(tmp_path)


def later(tmp_path: Path, **changes: Any) -> RunConfig:
    return RunConfig(**{"storage_path": str(tmp_path), "warm_start": "round1", **changes})


def test_trials_are_read_by_name_and_by_path_alike(tmp_path: Path, earlier: RunConfig) -> None:
    by_name = read_earlier(later(tmp_path), space_of(earlier).domains)
    by_path = read_earlier(later(tmp_path, warm_start=str(tmp_path / "round1")), space_of(earlier).domains)
    assert by_name == by_path
    assert [one.name for one in by_name.trials] == ["round1/0", "round1/1", "round1/2", "round1/4"]
    assert [one.score for one in by_name.trials] == [0.7, 0.4, 0.2, 0.65]
    first = by_name.trials[0].record
    assert set(first.params) == set(space_of(earlier).domains)
    assert [row["local_tpe"] for row in first.curve.values()] == [0.5, 0.7]
    assert (first.stop_reason, by_name.trials[3].record.stop_reason) == ("finished", "asha")
    assert by_name.notice == (
        "warm start: 4 of 6 trials of round1 were taken; 0 lie outside this search space, 2 had failed, had not ended, "
        "or lack a score"
    )


def test_they_feed_a_searcher(tmp_path: Path, earlier: RunConfig) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    run = later(tmp_path)
    searcher = GatedOptunaSearch(
        Run(
            config=run, domains=space_of(run).domains, datasets={}, storage=RunStorage(folder, None),
            journal=Journal(folder), warm=read_earlier(run, space_of(run).domains).trials,
        )
    )  # fmt: skip
    assert [trial.value for trial in searcher.study.trials] == [0.7, 0.4, 0.2, 0.65]


def test_what_lies_outside_this_space_is_left_out_and_the_notice_says_so(tmp_path: Path, earlier: RunConfig) -> None:
    space = dict(space_of(earlier).domains)
    taken = {one.record.params["depth"] for one in read_earlier(later(tmp_path), space).trials}
    space["depth"] = dataclasses.replace(space["depth"], high=max(taken) - 1)  # type: ignore[type-var, call-arg]
    found = read_earlier(later(tmp_path), space)
    assert 0 < len(found.trials) < 4
    assert {one.record.params["depth"] for one in found.trials} == {depth for depth in taken if depth < max(taken)}
    outside = 4 - len(found.trials)
    assert f"{len(found.trials)} of 6" in found.notice
    assert f"{outside} lie outside" in found.notice


def test_a_parameter_that_was_fixed_then_has_the_value_of_then(tmp_path: Path, earlier: RunConfig) -> None:
    run = later(tmp_path, space="extended")
    found = read_earlier(run, space_of(run).domains)
    assert len(found.trials) == 4  # lr 2e-4 and the rest of the baseline lie within the extended space
    assert {one.record.params["lr"] for one in found.trials} == {2e-4}


def test_the_notice_says_what_was_different_then(tmp_path: Path, earlier: RunConfig) -> None:
    found = read_earlier(later(tmp_path, epochs=10, lr=1e-3), space_of(earlier).domains)
    assert found.notice.endswith("; it had epochs 40, lr 0.0002")


def test_with_feedback_a_survivor_is_worth_its_global_tpe_and_without_one_it_is_left_out(
    tmp_path: Path, earlier: RunConfig
) -> None:
    found = read_earlier(later(tmp_path, feedback="global"), space_of(earlier).domains)
    assert [one.name for one in found.trials] == ["round1/0", "round1/1", "round1/2"]
    assert found.trials[0].score == 0.6


def test_no_warm_start_is_nothing(tmp_path: Path) -> None:
    run = RunConfig(storage_path=str(tmp_path))
    assert read_earlier(run, space_of(run).domains) == module.Earlier(trials=[], notice="")


def no_such_run(folder: Path) -> str:
    return "nothing"


def no_such_folder(folder: Path) -> str:
    return str(folder / "nothing")


def foreign_folder(folder: Path) -> str:
    (folder / "photos").mkdir()
    (folder / "photos" / "config.json").write_text("{}")
    return "photos"


def other_config(folder: Path) -> str:
    write_run(folder, "other")
    (folder / "other" / "config.json").write_text('{"a": 1}')
    return "other"


def other_lambda(folder: Path) -> str:
    write_run(folder, "counted", lambda_model="counted")
    return "counted"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_such_run, "there is no such run"),
        (no_such_folder, "there is no such run"),
        (foreign_folder, "is not the folder of a run"),
        (other_config, "is not the folder of a run"),
        (other_lambda, "choose the same --lambda_model"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_a_bad_one_is_refused_in_one_line_and_nothing_is_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], str], message: str, dry: list[str]
) -> None:
    name = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert tune(["--preset", "quick", "--storage_path", str(tmp_path), "--warm_start", name, *dry]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert message in said
    assert repr(name) in said
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_unpickled_and_nothing_is_written_there(
    tmp_path: Path, earlier: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    before = {path: path.read_bytes() for path in (tmp_path / "round1").rglob("*") if path.is_file()}
    assert len(read_earlier(later(tmp_path), space_of(earlier).domains).trials) == 4
    assert {path: path.read_bytes() for path in (tmp_path / "round1").rglob("*") if path.is_file()} == before
