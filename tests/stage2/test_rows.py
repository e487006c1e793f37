from typing import Any

import pytest

from nkat_ray.config import RunConfig
from nkat_ray.data import Missing
from nkat_ray.metrics import tpe_score
from nkat_ray.record.tables import STAGE2_SCHEMA
from nkat_ray.stage2 import rows as module

RUN = RunConfig(lambda_model="counted")
FIGURES = {"n_val": 20, "node": "host", "seconds": 1.5}


def test_every_row_has_every_column(survivor: Any, datasets: Any) -> None:
    mnist = datasets["mnist"]
    rows = [
        module.missing_row(survivor(), Missing("mnist", "why"), RUN), module.failed_row(survivor(), mnist, RUN, "why"),
        module.validated_row(survivor(), mnist, RUN, {"val_accuracy": 0.5, **FIGURES}),
    ]  # fmt: skip
    assert [list(row) for row in rows] == [STAGE2_SCHEMA.names] * 3
    assert [row["status"] for row in rows] == ["missing", "failed", "ok"]
    assert rows[2].items() >= FIGURES.items()


@pytest.mark.parametrize(("dataset", "mode"), [("cifar10", "as trained"), ("mnist", "finetune")])
def test_cifar10_is_scored_as_trained_and_the_others_by_transfer(
    survivor: Any, datasets: Any, dataset: str, mode: str
) -> None:
    assert module.failed_row(survivor(), datasets[dataset], RUN, "why")["mode"] == mode


@pytest.mark.parametrize(("accuracy", "status"), [(0.05, "failed"), (0.1, "failed"), (0.11, "ok")])
def test_at_or_below_chance_there_is_no_score(survivor: Any, datasets: Any, accuracy: float, status: str) -> None:
    row = module.validated_row(survivor(), datasets["mnist"], RUN, {"val_accuracy": accuracy, **FIGURES})
    assert (row["status"], row["val_accuracy"]) == (status, accuracy)
    assert row["val_tpe"] == (tpe_score(accuracy, 4) if status == "ok" else None)
    assert row["error"] == (None if status == "ok" else "at or below chance, 1 / 10")
    tested = module.tested_row(row, survivor(), RUN, round(100 * accuracy), 100)
    assert (tested["status"], tested["test_accuracy"]) == (status, accuracy)
    assert tested["tpe"] == tested["tpe_counted"] == (tpe_score(accuracy, 4) if status == "ok" else None)
    assert (tested["tpe_notes"] is None) == (tested["tpe_millions"] is None) == (status != "ok")


def test_a_validation_at_chance_stays_failed_whatever_the_test_says(survivor: Any, datasets: Any) -> None:
    row = module.validated_row(survivor(), datasets["mnist"], RUN, {"val_accuracy": 0.1, **FIGURES})
    tested = module.tested_row(row, survivor(), RUN, 50, 100)
    assert (tested["status"], tested["test_accuracy"]) == ("failed", 0.5)


def test_a_test_that_broke_off_keeps_the_validation(survivor: Any, datasets: Any) -> None:
    row = module.validated_row(survivor(), datasets["mnist"], RUN, {"val_accuracy": 0.5, **FIGURES})
    assert module.untested_row(row, "why") == {**row, "status": "failed", "error": "why"}
