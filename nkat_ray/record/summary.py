"""Write the tables of a run and compute its summary.json (docs/spec.md section 8)."""

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nkat_ray import __version__
from nkat_ray.config import RunConfig
from nkat_ray.errors import DONE
from nkat_ray.files import CURVES_FILE, STAGE2_FILE, TRIALS_FILE
from nkat_ray.metrics import GLOBAL_TARGETS, NOTES_GATE
from nkat_ray.record import scoring, tables
from nkat_ray.record.journal import RunState
from nkat_ray.record.rows import curve_rows, stage2_rows, training_share, trial_rows, trial_start_s

PACKAGES = ("torch", "torchvision", "timm", "ray", "optuna", "numpy", "pyarrow")


def write_tables(folder: Path, config: RunConfig, state: RunState) -> None:
    """Write trials.parquet, curves.parquet and stage2.parquet."""
    about = {
        "run": config.name,
        "preset": config.preset,
        "gate": config.gate,
        "notes_gate": NOTES_GATE,
        "seed": config.seed,
    }
    tables.write_rows(folder / TRIALS_FILE, trial_rows(state, config), metadata=about)
    tables.write_rows(folder / CURVES_FILE, curve_rows(state), metadata=about)
    tables.write_rows(folder / STAGE2_FILE, stage2_rows(state), metadata=about)


def summarise(config: RunConfig, state: RunState, data: Mapping[str, Any], code: int | None) -> dict[str, Any]:
    """Compute summary.json (docs/spec.md section 8).

    Args:
        data: description of the datasets, from `describe_data`.
        code: the run's exit code; None while it is in progress.
    """
    trials, rows = trial_rows(state, config), stage2_rows(state)
    survivors = state.survivors(config.gate)
    winner = state.order[0] if code == DONE else None
    summary = {
        "name": config.name,
        "preset": config.preset,
        "gate": config.gate,
        "notes_gate": NOTES_GATE,
        "lambda_model": config.lambda_model,
        "space": config.space,
        "seed": config.seed,
        "data": data,
        "n_trials": len(trials),
        "stop_reasons": scoring.stop_counts(trials),
        "survivors": survivors,
        "ranking": state.order,
        "weights_kept": state.weights_kept(config.gate),
        "winner": None if winner is None else _winner(winner, trials, rows),
        "targets": GLOBAL_TARGETS,
        "notices": state.notices,
        "training_share": training_share(state),
        "trial_start_s": trial_start_s(state),
        "wall_s": state.wall_s,
        "versions": versions(),
        "exit_code": code,
    }
    verdict = scoring.verdict_of(summary, rows)
    return {**summary, "verdict": verdict.status, "verdict_sentence": verdict.sentence}


def _winner(trial: int, trials: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    row = next(row for row in trials if row["trial"] == trial)
    scores = scoring.result_scores(rows, trial)
    mine = {r["dataset"]: r for r in rows if r["trial"] == trial}  # including the user's own datasets
    return {
        "trial": trial,
        "config": tables.config_of(row),
        "seed": row["seed"],
        "lambda_theory": row["lambda_theory"],
        "val_global_tpe": scoring.validation_scores(rows, trial).global_tpe,
        **asdict(scores),
        "global_tpe_interval": scoring.global_interval(rows, trial),
        "global_tpe_by_model": scoring.global_tpe_by_model(rows, trial),
        "counted": scoring.datasets_counted(rows, trial),
        "datasets": {
            name: {"accuracy": r["test_accuracy"], "tpe": r["tpe"], "n": r["n_test"], "status": r["status"]}
            for name, r in mine.items()
        },
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the packages that results depend on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"nkat_ray": __version__, "python": platform.python_version(), **found}
