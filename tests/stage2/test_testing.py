from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.metrics import tpe_score, wilson_interval
from nkat_ray.record.run import Run
from nkat_ray.stage2.testing import score_on_test
from nkat_ray.stage2.weights import transferred_file


@pytest.fixture
def validated(make_run: Callable[..., Run], payload: bytes, tmp_path: Path) -> Run:
    """A run with trial 2 validated on CIFAR-10, and on MNIST, which broke off."""
    run = make_run(tmp_path / "run")
    for dataset, status, error in (("cifar10", "ok", None), ("mnist", "failed", "why")):
        row = {"trial": 2, "dataset": dataset, "classes": 10, "status": status, "error": error, "val_accuracy": 0.2}
        run.journal.write("stage2", row=row, epoch=1)
    path = transferred_file(run.folder, 2, "cifar10")
    path.parent.mkdir()
    path.write_bytes(payload)
    return run


def test_figures_follow_from_the_counts_on_workers(
    ray_local: Any, validated: Run, survivor: Any, heard: Any, payload: bytes
) -> None:
    score_on_test(validated, {2: survivor(2)}, heard)
    tested = validated.state.tested
    assert heard.rows == list(tested.values())
    assert heard.ticks > 0
    row = tested[2, "cifar10"]
    assert row["n_test"] == 40
    correct = round(row["test_accuracy"] * 40)
    assert (row["ci_low"], row["ci_high"]) == wilson_interval(correct, 40)
    if row["status"] == "ok":
        assert row["tpe"] == row["tpe_notes"] == tpe_score(row["test_accuracy"], survivor().lambdas()["notes"])
    else:
        assert "chance" in row["error"]


def test_a_row_without_weights_is_completed_as_it_is(sent: Any, validated: Run, survivor: Any, heard: Any) -> None:
    score_on_test(validated, {2: survivor(2)}, heard)
    assert validated.state.tested[2, "mnist"] == validated.state.stage2[2, "mnist"]
    assert sent == ["count_on_test"]


def test_what_is_tested_is_not_tested_again(sent: Any, validated: Run, survivor: Any, heard: Any) -> None:
    for _ in range(2):
        score_on_test(validated, {2: survivor(2)}, heard)
    assert sent == ["count_on_test"]
    assert len(heard.rows) == 2


def test_a_test_that_breaks_off_fails_that_row_alone(ray_local: Any, validated: Run, survivor: Any, heard: Any) -> None:
    transferred_file(validated.folder, 2, "cifar10").write_bytes(b"no weights at all")
    score_on_test(validated, {2: survivor(2)}, heard)
    row = validated.state.tested[2, "cifar10"]
    assert (row["status"], row["val_accuracy"]) == ("failed", 0.2)
    assert "not NKAT weights" in row["error"]
