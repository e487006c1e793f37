"""Several runs on one page."""

import dataclasses
import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.record.run_folder import RecordedRun, load_run
from nkat_ray.report.comparison import compare_page, differences, distinct_names, headline


@pytest.fixture
def runs(make_run: Callable[..., Any]) -> list[RecordedRun]:
    """Three runs: the gate differs, and so does a flag; in the last one no trial passed."""
    made = [make_run("one"), make_run("two", gate=0.46, seed=3), make_run("none", gate=1.0, datasets=["cifar10"])]
    return [load_run(run.folder) for run in made]


def test_the_page_names_every_run_and_its_verdict(runs: list[RecordedRun], tmp_path: Path) -> None:
    page = html.unescape(compare_page(runs).save(tmp_path / "compare.html").read_text(encoding="utf-8"))
    table = re.search(r'<table id="runs".*?</table>', page, re.DOTALL)
    assert table
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table[0].split("<tr>")[2:]]
    assert [row[0] for row in rows] == ["one", "two", "none"]
    assert all("not reached" in row[1] for row in rows)  # the verdict stands beside the name


def test_the_headline_is_about_the_test_figures_of_the_table(runs: list[RecordedRun]) -> None:
    one, two, none = runs
    assert headline(distinct_names([one, none])) == (
        "one has the highest Global TPE on test: 0.619 (95 % interval 0.617 to 0.622), the only one that counts on all "
        "four datasets."
    )
    assert headline(distinct_names([none, none])) == "No run has a winner that counts on all four datasets."
    assert "its interval overlaps that of" in headline(distinct_names([one, two]))
    better = [{**row, "test_accuracy": 0.99, "tpe": 0.75, "ci_low": 0.988, "ci_high": 0.992} for row in two.stage2]
    apart = headline(distinct_names([one, dataclasses.replace(two, stage2=better)]))
    assert apart.startswith("two has the highest")
    assert apart.endswith("its interval overlaps no other.")


def test_what_differs_are_settings_and_no_dictionaries(runs: list[RecordedRun]) -> None:
    found = differences(distinct_names(runs))
    assert found["gate"] == [0.42, 0.46, 1.0]
    assert found["seed"] == [0, 3, 0]
    assert found["datasets"] == [*["mnist, fashion_mnist, emnist_letters, cifar10"] * 2, "cifar10"]
    assert not {"name", "found", "fixed", "own_space"} & set(found)
    assert not any(isinstance(value, dict) for values in found.values() for value in values)
    assert differences(distinct_names(runs[:1])) == {}


def test_runs_of_one_name_are_distinguished_by_their_folders(runs: list[RecordedRun]) -> None:
    same = dataclasses.replace(runs[1], config={**runs[1].config, "name": "one"})
    assert list(distinct_names([runs[0], same])) == [str(runs[0].folder), str(runs[1].folder)]
