"""Convert the journal's state into the rows of the three tables (docs/spec.md section 8); compute time statistics."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from nkat_ray.config import RunConfig
from nkat_ray.metrics import EPOCH, LOCAL_TPE, NKAT_PREFIX, NKAT_SCALARS, TRAIN_ACCURACY, TRAIN_LOSS, VAL_ACCURACY
from nkat_ray.record.journal import Key, Row, RunState, TrialRecord
from nkat_ray.record.tables import CONFIG_PREFIX
from nkat_ray.space import trial_config

CURVE_KEYS: Final = (EPOCH, TRAIN_LOSS, VAL_ACCURACY, LOCAL_TPE, "lr", "images_per_s", "epoch_s", "started_s")


def trial_row(record: TrialRecord, run: RunConfig, state: RunState) -> Row:
    """Return a trial's row of trials.parquet; unknown values are None."""
    best, last = record.best_row(), record.curve.get(max(record.curve, default=0), {})
    start = state.attempts[0][0]
    ended = record.ended_s if record.ended_s is not None else state.attempts[-1][1]
    return {
        "trial": record.trial,
        "trial_id": record.trial_id,
        **{CONFIG_PREFIX + name: value for name, value in asdict(trial_config(run, record.params)).items()},
        "stop_reason": record.stop_reason,
        "stop_detail": record.stop_detail,
        "error": record.error,
        "epochs": len(record.curve),
        "best_epoch": best[EPOCH] if best else None,
        "best_val_accuracy": best[VAL_ACCURACY] if best else None,
        "best_local_tpe": best[LOCAL_TPE] if best else None,
        "lambda_theory": last.get("lambda_theory"),
        "passed_gate": record.passed(run.gate),
        "seed": record.seed,
        "gpus": last.get("gpus"),
        "cpus": last.get("cpus"),
        "node": last.get("node"),
        "started_s": record.started_s - start if record.started_s is not None else None,
        "start_s": start_seconds(record, state),
        "train_s": sum(row["epoch_s"] for row in record.curve.values()),
        "wall_s": ended - record.started_s if record.started_s is not None else None,
    }


def trial_rows(state: RunState, run: RunConfig) -> list[Row]:
    """Return the rows of trials.parquet, sorted by number."""
    return [trial_row(record, run, state) for _, record in sorted(state.trials.items())]


def curve_rows(state: RunState) -> list[Row]:
    """Return the rows of curves.parquet, sorted by trial and epoch; a score that is not finite is NaN."""
    start = state.attempts[0][0] if state.attempts else 0.0
    return [
        {"trial": number, **curve_row(row), "started_s": row["started_s"] - start}
        for number, record in sorted(state.trials.items())
        for _, row in sorted(record.curve.items())
    ]


def curve_row(row: Mapping[str, Any]) -> Row:
    """Convert a reported epoch into a row of curves.parquet; an NKAT scalar becomes a list, one value per block."""
    found = {**{key: row[key] for key in CURVE_KEYS}, TRAIN_ACCURACY: row.get(TRAIN_ACCURACY)}  # earlier runs lack it
    for name in NKAT_SCALARS:
        start = f"{NKAT_PREFIX}{name}/block_"
        blocks = sum(key.startswith(start) for key in row)
        found[name] = [row[f"{start}{block}"] for block in range(blocks)] or None  # none where the loss was not finite
    return found


def stage2_rows(state: RunState) -> list[Row]:
    """Return the rows of stage2.parquet, sorted by trial and dataset, with test scores where they exist."""
    return [
        {**state.tested.get(key, row), "started_s": _stage2_start(key, row, state)}
        for key, row in sorted(state.stage2.items())
    ]


def _stage2_start(key: Key, row: Mapping[str, Any], state: RunState) -> float | None:
    """Return the start of a validation in seconds from the run's start; None if it never ran."""
    if row.get("seconds") is None or not state.attempts:
        return None
    return float(state.stage2_ended_s[key] - row["seconds"] - state.attempts[0][0])


def training_share(state: RunState) -> float | None:
    """Return training time / slot time, 0..1, between the first step of any trial and the start of the last trial.

    Time between two drivers does not count. None if all trials started at once.
    """
    rows = [row for record in state.trials.values() for row in record.curve.values()]
    if not rows or not state.slot_changes:
        return None
    first = min(row["started_s"] for row in rows)
    last = max(record.started_s for record in state.trials.values() if record.started_s is not None)
    begins = [-math.inf, *(time for time, _ in state.slot_changes[1:])]  # the first number applies from the start
    available = math.fsum(
        slots * max(0.0, min(last, end, until) - max(first, start, since))
        for since, until, (_, slots) in zip(begins, [*begins[1:], math.inf], state.slot_changes, strict=True)
        for start, end in state.attempts
    )
    trained = math.fsum(max(0.0, min(last, row["started_s"] + row["epoch_s"]) - row["started_s"]) for row in rows)
    return trained / available if available > 0 else None


def trial_start_s(state: RunState) -> float | None:
    """Return the median of `start_seconds` over the trials; None if it is unknown for all."""
    seconds = [start_seconds(record, state) for record in state.trials.values()]
    known = [value for value in seconds if value is not None]
    return statistics.median(known) if known else None


def start_seconds(record: TrialRecord, state: RunState) -> float | None:
    """Return the seconds from a trial's proposal to its first training step: the overhead of starting it.

    None if the trial has no epoch, or if its driver was killed in between.
    """
    if record.proposed_s is None or not record.curve:
        return None
    first = record.curve[min(record.curve)]["started_s"]
    whole = any(start <= record.proposed_s and first <= end for start, end in state.attempts)
    return float(first - record.proposed_s) if whole else None
