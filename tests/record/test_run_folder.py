"""A run's folder is read from one truth: its tables once it has ended, else its journal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.errors import INTERRUPTED, UserError
from nkat_ray.files import (
    CONFIG_FILE,
    CURVES_FILE,
    JOURNAL_FILE,
    STAGE2_FILE,
    SUMMARY_FILE,
    TRIALS_FILE,
)
from nkat_ray.record import tables
from nkat_ray.record.run_folder import load_run

MakeRun = Callable[..., Any]


def test_a_run_that_has_ended_is_its_tables(make_run: MakeRun) -> None:
    made = make_run()
    run = load_run(made.folder)
    assert run.ended
    assert (run.winner, run.survivors, run.name) == (0, [0, 5, 7], "fake-run")
    assert [row["trial"] for row in run.trials] == list(range(8))
    assert run.verdict.sentence == made.summary["verdict_sentence"]
    assert run.ranking[0] == run.winner


def test_a_run_that_goes_on_is_its_journal_whatever_its_snapshots_say(make_run: MakeRun) -> None:
    made = make_run(running=True)
    tables.write_rows(made.folder / TRIALS_FILE, [{"trial": 0, "passed_gate": True, "epochs": 1}])
    tables.write_rows(made.folder / CURVES_FILE, [])
    tables.write_rows(made.folder / STAGE2_FILE, [])
    run = load_run(made.folder)
    assert not run.ended
    assert [row["trial"] for row in run.trials] == list(range(8))
    assert len(run.curves) == len(made.curves)
    assert run.survivors == made.summary["survivors"]
    assert [row["epochs"] for row in run.trials] == [row["epochs"] for row in made.trials]
    assert run.verdict.status == "undecided"


def test_an_interrupted_run_is_its_journal_and_keeps_its_exit_code(make_run: MakeRun) -> None:
    made = make_run(running=True)
    tables.write_summary(made.folder / SUMMARY_FILE, made.summary | {"exit_code": INTERRUPTED, "survivors": []})
    run = load_run(made.folder)
    assert (run.summary["exit_code"], run.ended) == (INTERRUPTED, False)
    assert run.survivors == made.summary["survivors"]


def test_a_summary_that_is_not_written_yet_can_be_given(make_run: MakeRun) -> None:
    made = make_run()
    (made.folder / SUMMARY_FILE).unlink()
    assert load_run(made.folder, made.summary).winner == made.summary["winner"]["trial"]


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"preset": "round2"}, ["patch_size", "conv_stem", "embed_dim", "depth", "temperature", "top_p"]),
        ({"preset": "round2", "fixed": ["depth", "top_p"]}, ["patch_size", "conv_stem", "embed_dim", "temperature"]),
        ({"own_space": {"depth": {"values": [4, 5]}, "lr": {"low": 1e-4, "high": 1e-2}}, "fixed": ["lr"]}, ["depth"]),
    ],
)
def test_what_the_user_fixed_is_not_searched(make_run: MakeRun, fields: dict[str, Any], left: list[str]) -> None:
    assert list(load_run(make_run(**fields).folder).searched) == left


def test_the_datasets_are_those_that_the_user_asked_for(make_run: MakeRun) -> None:
    assert load_run(make_run().folder).datasets == ["mnist", "fashion_mnist", "emnist_letters", "cifar10"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="contains no run"):
            load_run(folder)


@pytest.mark.parametrize("file", [TRIALS_FILE, CURVES_FILE, STAGE2_FILE])
def test_a_table_that_is_missing_is_named(make_run: MakeRun, file: str) -> None:
    made = make_run()
    (made.folder / file).unlink()
    with pytest.raises(UserError, match=file):
        load_run(made.folder)


def test_a_run_that_goes_on_without_a_journal_is_refused(make_run: MakeRun) -> None:
    made = make_run(running=True)
    (made.folder / JOURNAL_FILE).unlink()
    with pytest.raises(UserError, match=JOURNAL_FILE):
        load_run(made.folder)


def test_a_summary_without_ranking_is_ranked_again(make_run: MakeRun) -> None:
    made = make_run()
    text = (made.folder / SUMMARY_FILE).read_text()
    ranking = json.loads(text)["ranking"]
    (made.folder / SUMMARY_FILE).write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "ranking"}))
    assert load_run(made.folder).ranking == ranking
    assert (made.folder / CONFIG_FILE).exists()
