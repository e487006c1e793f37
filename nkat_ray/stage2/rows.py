"""Build the rows of stage2.parquet (docs/spec.md section 8): one row per survivor and dataset.

The validation creates a row, also if it fails; the test completes it.
"""

from collections.abc import Mapping
from typing import Any

from nkat_ray.config import STAGE1_DATASET, RunConfig
from nkat_ray.data import Dataset, Missing
from nkat_ray.metrics import counts, tpe_score, wilson_interval
from nkat_ray.record.tables import STAGE2_SCHEMA, Row
from nkat_ray.stage2.survivor import Survivor


def missing_row(survivor: Survivor, dataset: Missing, run: RunConfig) -> Row:
    """Return the row of a survivor on a missing dataset."""
    return _row(survivor, dataset, run, status="missing", error=dataset.reason)


def failed_row(survivor: Survivor, dataset: Dataset, run: RunConfig, error: str) -> Row:
    """Return the row of a validation that failed; `error` is one line."""
    return _row(survivor, dataset, run, status="failed", error=error)


def validated_row(survivor: Survivor, dataset: Dataset, run: RunConfig, figures: Mapping[str, Any]) -> Row:
    """Return the row of a validation; with an accuracy at or below chance it is `failed` and has no score.

    Args:
        figures: measured columns, including `val_accuracy` (0..1).
    """
    accuracy, classes = figures["val_accuracy"], dataset.classes
    if not counts(accuracy, classes):
        error = f"at or below chance, 1 / {classes}"
        return _row(survivor, dataset, run, status="failed", error=error, **figures)
    score = tpe_score(accuracy, survivor.lambdas()[run.lambda_model])
    return _row(survivor, dataset, run, status="ok", error=None, val_tpe=score, **figures)


def tested_row(validated: Mapping[str, Any], survivor: Survivor, run: RunConfig, correct: int, n: int) -> Row:
    """Complete a row with the result of its test: accuracy, interval, and TPE under each lambda model."""
    accuracy, (low, high) = correct / n, wilson_interval(correct, n)
    row = {**validated, "test_accuracy": accuracy, "n_test": n, "ci_low": low, "ci_high": high}
    if not counts(accuracy, row["classes"]):
        return {**row, "status": "failed", "error": f"test accuracy at or below chance, 1 / {row['classes']}"}
    scores = {model: tpe_score(accuracy, lam) for model, lam in survivor.lambdas().items()}
    return {**row, "tpe": scores[run.lambda_model], **{f"tpe_{model}": score for model, score in scores.items()}}


def untested_row(validated: Mapping[str, Any], error: str) -> Row:
    """Complete a row whose test failed; `error` is one line."""
    return {**validated, "status": "failed", "error": error}


def _row(survivor: Survivor, dataset: Dataset | Missing, run: RunConfig, **known: Any) -> Row:
    return {
        **dict.fromkeys(STAGE2_SCHEMA.names),
        "trial": survivor.trial,
        "dataset": dataset.name,
        "classes": None if isinstance(dataset, Missing) else dataset.classes,
        "mode": "as trained" if dataset.name == STAGE1_DATASET else run.transfer,
        **known,
    }
