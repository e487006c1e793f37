"""From the journal's state to the rows of trials.parquet and curves.parquet (docs/spec.md section 8)."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nkat_ray.config import RunConfig
from nkat_ray.metrics import EPOCH, LOCAL_TPE, NKAT_PREFIX, NKAT_SCALARS, TRAIN_LOSS, VAL_ACCURACY
from nkat_ray.search.journal import RunState, TrialRecord
from nkat_ray.search.space import trial_config

CURVE_KEYS = (EPOCH, TRAIN_LOSS, VAL_ACCURACY, LOCAL_TPE, "lr", "images_per_s", "epoch_s", "started_s")


def trial_row(record: TrialRecord, run: RunConfig, state: RunState) -> dict[str, Any]:
    """One trial as a row of trials.parquet; null where nothing is known."""
    best, last = record.best_row(), record.curve.get(max(record.curve, default=0), {})
    start = state.attempts[0][0]
    ended = record.ended_s if record.ended_s is not None else state.attempts[-1][1]
    return {
        "trial": record.trial,
        "trial_id": record.trial_id,
        **{f"config/{name}": value for name, value in asdict(trial_config(run, record.params)).items()},
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


def trial_rows(state: RunState, run: RunConfig) -> list[dict[str, Any]]:
    """All trials, by number."""
    return [trial_row(record, run, state) for _, record in sorted(state.trials.items())]


def curve_rows(state: RunState) -> list[dict[str, Any]]:
    """All epochs of all trials, by trial and epoch; NaN where a score was not finite, started_s from the run's
    start."""
    start = state.attempts[0][0] if state.attempts else 0.0
    return [
        {"trial": number, **curve_row(row), "started_s": row["started_s"] - start}
        for number, record in sorted(state.trials.items())
        for _, row in sorted(record.curve.items())
    ]


def curve_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What an epoch reported as curves.parquet's columns: an NKAT scalar's values, block by block, are one list."""
    found = {key: row[key] for key in CURVE_KEYS}
    for name in NKAT_SCALARS:
        start = f"{NKAT_PREFIX}{name}/block_"
        blocks = sum(key.startswith(start) for key in row)
        found[name] = [row[f"{start}{block}"] for block in range(blocks)] or None  # none where the loss was not finite
    return found


def training_share(state: RunState) -> float | None:
    """Training seconds over slot seconds, from the first trial's first step until no trial waits to start.

    The time between two drivers does not count. None where no trial ever waited: all of them started at once.
    """
    epochs = [
        (row["started_s"], row["started_s"] + row["epoch_s"])
        for record in state.trials.values()
        for row in record.curve.values()
    ]
    starts = [record.started_s for record in state.trials.values() if record.started_s is not None]
    if not epochs or not state.slot_changes:
        return None
    first, last = min(start for start, _ in epochs), max(starts)
    attempts = [(max(first, start), min(last, end)) for start, end in state.attempts]
    available = math.fsum(slot_seconds(state.slot_changes, start, end) for start, end in attempts if end > start)
    if available <= 0:
        return None
    trained = math.fsum(max(0.0, min(last, end) - max(first, start)) for start, end in epochs)
    return trained / available


def slot_seconds(changes: Sequence[tuple[float, int]], start: float, end: float) -> float:
    """The integral of the number of slots over a span of time; what holds first is taken to have held before.

    Args:
        changes: (time, slots from then on), in order; not empty.
        start: of the span.
        end: of the span, not before `start`.
    """
    times = [-math.inf, *(time for time, _ in changes[1:]), math.inf]
    return math.fsum(
        slots * max(0.0, min(end, until) - max(start, since))
        for (_, slots), (since, until) in zip(changes, itertools.pairwise(times), strict=True)
    )


def trial_start_s(state: RunState) -> float | None:
    """Median of `start_seconds` over the trials; None where it is known of none."""
    known = [start_seconds(record, state) for record in state.trials.values()]
    return statistics.median(found) if (found := [s for s in known if s is not None]) else None


def start_seconds(record: TrialRecord, state: RunState) -> float | None:
    """From a trial's proposal to its first step: what it costs to start one.

    None for a trial without an epoch, and for one whose first driver was killed in between.
    """
    if record.proposed_s is None or not record.curve:
        return None
    first = record.curve[min(record.curve)]["started_s"]
    whole = any(start <= record.proposed_s and first <= end for start, end in state.attempts)
    return float(first - record.proposed_s) if whole else None
