import dataclasses
import math
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nkat_ray.config import RunConfig
from nkat_ray.record.journal import RunState, TrialRecord
from nkat_ray.record.rows import curve_rows, start_seconds, training_share, trial_row, trial_rows, trial_start_s


def record(trial: int = 0, **fields: Any) -> TrialRecord:
    return TrialRecord(trial=trial, params=fields.pop("params", {}), seed=7, study_number=trial, **fields)


def row(epoch: int, score: float = 0.3, *, started_s: float = 0.0, epoch_s: float = 10.0) -> dict[str, Any]:
    return {
        "epoch": epoch, "train_loss": 2.0, "val_accuracy": score, "local_tpe": score, "lr": 1e-3, "images_per_s": 100.0,
        "epoch_s": epoch_s, "started_s": started_s, "lambda_theory": 22.0, "node": "host", "gpus": 0.25, "cpus": 2,
        "parameters": 10, "nkat_parameters": 4,
    }  # fmt: skip


def state_of(*records: TrialRecord, attempts: list[tuple[float, float]], slots: int | None = 1) -> RunState:
    return RunState(
        trials={r.trial: r for r in records},
        attempts=attempts,
        slot_changes=[] if slots is None else [(attempts[0][0], slots)],
    )


# --- trials.parquet ---------------------------------------------------------------------------------------------------


def test_a_finished_trial() -> None:
    curve = {epoch: row(epoch, score) for epoch, score in ((1, 0.3), (2, 0.7), (3, 0.5))}
    trial = record(
        3, params={"depth": 5}, trial_id="abc", started_s=110.0, curve=curve, stop_reason="finished",
        stop_detail="epoch 3", ended_s=150.0,
    )  # fmt: skip
    found = trial_row(trial, RunConfig(), state_of(trial, attempts=[(100.0, 400.0)]))
    config = {f"config/{name}": value for name, value in {**asdict(RunConfig().trial), "depth": 5}.items()}
    assert found == config | {
        "trial": 3, "trial_id": "abc", "stop_reason": "finished", "stop_detail": "epoch 3", "error": None, "epochs": 3,
        "best_epoch": 2, "best_val_accuracy": 0.7, "best_local_tpe": 0.7, "lambda_theory": 22.0, "passed_gate": True,
        "seed": 7, "gpus": 0.25, "cpus": 2, "node": "host", "started_s": 10.0, "start_s": None, "train_s": 30.0,
        "wall_s": 40.0,
    }  # fmt: skip


def test_a_trial_that_was_never_finite_has_no_best() -> None:
    trial = record(curve={1: row(1, math.nan)}, stop_reason="nan", started_s=0.0, ended_s=1.0)
    found = trial_row(trial, RunConfig(), state_of(trial, attempts=[(0.0, 1.0)]))
    assert [found[key] for key in ("best_epoch", "best_val_accuracy", "best_local_tpe")] == [None] * 3
    assert (found["epochs"], found["passed_gate"]) == (1, False)


def test_a_trial_that_was_only_proposed() -> None:
    found = trial_row(record(), RunConfig(), state_of(record(), attempts=[(5.0, 9.0)]))
    unknown = ("stop_reason", "trial_id", "started_s", "wall_s", "lambda_theory", "node", "gpus", "cpus", "best_epoch")
    assert [found[key] for key in unknown] == [None] * len(unknown)
    assert (found["epochs"], found["train_s"]) == (0, 0)


def test_a_trial_that_still_runs_lasts_until_the_last_sign_of_life() -> None:
    trial = record(started_s=110.0, curve={1: row(1)})
    found = trial_row(trial, RunConfig(), state_of(trial, attempts=[(100.0, 130.0)]))
    assert (found["stop_reason"], found["wall_s"]) == (None, 20.0)


def test_rows_are_in_order_of_number_and_epoch() -> None:
    late, early = record(11, curve={2: row(2), 1: row(1)}), record(2, curve={1: row(1)})
    state = state_of(late, early, attempts=[(0.0, 1.0)])
    assert [r["trial"] for r in trial_rows(state, RunConfig())] == [2, 11]
    assert [(r["trial"], r["epoch"]) for r in curve_rows(state)] == [(2, 1), (11, 1), (11, 2)]


def test_no_trial_no_row() -> None:
    assert trial_rows(RunState(), RunConfig()) == []
    assert curve_rows(RunState()) == []


def test_a_curves_row_holds_the_contracts_columns() -> None:
    trial = record(4, curve={1: row(1, math.nan, started_s=130.0)})
    (found,) = curve_rows(state_of(trial, attempts=[(100.0, 200.0)]))
    contract = {"trial", "epoch", "train_loss", "val_accuracy", "local_tpe", "lr", "images_per_s", "epoch_s"}
    assert contract <= set(found)
    assert math.isnan(found["local_tpe"])
    assert found["train_accuracy"] is None  # this row is of a version that did not report it
    assert found["started_s"] == 30.0  # from the run's start, as in trials.parquet


def test_nkat_scalars_are_one_list_each_by_block_not_by_name() -> None:
    blocks = 12  # block_10 comes before block_2 by name
    scalars = {f"nkat/{name}/block_{n}": float(n) for name in ("alpha", "mlp_gain") for n in reversed(range(blocks))}
    trial = record(curve={1: row(1) | scalars, 2: row(2, math.nan)})
    first, second = curve_rows(state_of(trial, attempts=[(0.0, 1.0)]))
    assert first["alpha"] == first["mlp_gain"] == [float(n) for n in range(blocks)]
    assert (first["beta"], second["alpha"]) == (None, None)


# --- training share ---------------------------------------------------------------------------------------------------


def brute_force_share(state: RunState, *, step: float = 0.5) -> float | None:
    """Looks at the middle of every tick of the time line: who trains, and how many slots are there?"""
    starts = [r.started_s for r in state.trials.values() if r.started_s is not None]
    epochs = [(e["started_s"], e["started_s"] + e["epoch_s"]) for r in state.trials.values() for e in r.curve.values()]
    if not epochs or not starts or not state.slot_changes:
        return None
    first, last = min(start for start, _ in epochs), max(starts)
    trained = available = 0
    for tick in range(int(last / step) + 1):
        now = (tick + 0.5) * step
        if not first <= now <= last:
            continue
        if any(start <= now <= end for start, end in state.attempts):
            available += [n for since, n in state.slot_changes if since <= now][-1]
        trained += sum(start <= now <= end for start, end in epochs)
    return trained / available if available else None


@st.composite
def timelines(draw: st.DrawFn) -> RunState:
    """Whole seconds: two drivers with a pause between, slots, trials that train in one of them or in both."""
    pause = (draw(st.integers(30, 60)), draw(st.integers(61, 90)))
    end = draw(st.integers(91, 120))
    trials = {}
    for number in range(draw(st.integers(0, 6))):
        begin = draw(st.integers(0, end - 1))
        now, curve = begin + draw(st.integers(0, 5)), {}
        for epoch in range(1, draw(st.integers(0, 5)) + 1):
            length = draw(st.integers(1, 15))
            if not any(low <= now and now + length <= high for low, high in ((0, pause[0]), (pause[1], end))):
                now = pause[1]  # no epoch spans the pause: it is lost and repeated
                if now + length > end:
                    break
            curve[epoch] = row(epoch, started_s=float(now), epoch_s=float(length))
            now += length
        trials[number] = record(number, started_s=float(begin), curve=curve)
    changes = sorted({0, *draw(st.lists(st.integers(1, end), max_size=3))})
    return RunState(
        trials=trials, attempts=[(0.0, float(pause[0])), (float(pause[1]), float(end))],
        slot_changes=[(float(since), draw(st.integers(1, 4))) for since in changes],
    )  # fmt: skip


@given(timelines())
def test_training_share_equals_a_brute_force_time_line(state: RunState) -> None:
    assert training_share(state) == pytest.approx(brute_force_share(state))


def test_training_share_of_a_full_and_of_a_half_empty_run() -> None:
    full = [record(n, started_s=10.0 * n, curve={1: row(1, started_s=10.0 * n)}) for n in range(4)]
    assert training_share(state_of(*full, attempts=[(0.0, 40.0)])) == pytest.approx(1.0)
    assert training_share(state_of(*full, attempts=[(0.0, 40.0)], slots=2)) == pytest.approx(0.5)


def test_training_share_is_unknown_where_no_trial_waited() -> None:
    both = [record(n, started_s=0.0, curve={1: row(1, started_s=3.0)}) for n in range(2)]
    assert training_share(state_of(*both, attempts=[(0.0, 40.0)], slots=2)) is None


def test_a_node_that_joins_late_counts_from_then_on() -> None:
    both = [record(n, started_s=20.0 * n, curve={1: row(1, started_s=20.0 * n, epoch_s=20.0)}) for n in range(2)]
    state = dataclasses.replace(state_of(*both, attempts=[(0.0, 40.0)]), slot_changes=[(0.0, 1), (10.0, 3)])
    assert training_share(state) == pytest.approx(20 / (10 + 3 * 10))


@pytest.mark.parametrize(
    "state",
    [
        RunState(),
        state_of(record(), attempts=[(0.0, 1.0)]),
        state_of(record(started_s=0.0, curve={1: row(1)}), attempts=[(0.0, 1.0)], slots=None),
    ],
)
def test_training_share_is_unknown_where_nothing_was_trained(state: RunState) -> None:
    assert training_share(state) is None


# --- what it costs to start a trial -----------------------------------------------------------------------------------


def test_a_start_lasts_from_the_proposal_to_the_first_step() -> None:
    trial = record(proposed_s=110.0, started_s=110.1, curve={2: row(2, started_s=130.0), 1: row(1, started_s=110.4)})
    assert start_seconds(trial, state_of(trial, attempts=[(100.0, 200.0)])) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("proposed_s", "curve"), [(None, {1: row(1, started_s=5.0)}), (1.0, {}), (1.0, {1: row(1, started_s=60.0)})]
)
def test_a_start_is_unknown_without_an_epoch_and_across_drivers(
    proposed_s: float | None, curve: dict[int, dict[str, Any]]
) -> None:
    trial = record(proposed_s=proposed_s, curve=curve)
    assert start_seconds(trial, state_of(trial, attempts=[(0.0, 10.0), (50.0, 90.0)])) is None


def test_the_runs_start_time_is_the_median_of_what_is_known() -> None:
    known = [record(n, proposed_s=0.0, curve={1: row(1, started_s=s)}) for n, s in enumerate((9.0, 0.2, 0.3))]
    assert trial_start_s(state_of(*known, record(3), attempts=[(0.0, 20.0)])) == 0.3
    assert trial_start_s(state_of(record(), attempts=[(0.0, 20.0)])) is None
