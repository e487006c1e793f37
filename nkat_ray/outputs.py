"""What a run leaves behind: tables, summary.json and the report (docs/spec.md section 8)."""

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nkat_ray import __version__
from nkat_ray.config import RunConfig
from nkat_ray.data import Dataset, Missing
from nkat_ray.exit_codes import DONE
from nkat_ray.files import CURVES_FILE, STAGE2_FILE, SUMMARY_FILE, TRIALS_FILE
from nkat_ray.metrics import GLOBAL_TARGETS, NOTES_GATE
from nkat_ray.report import results, tables
from nkat_ray.report.terminal import Screen, final_report, result_lines
from nkat_ray.search.journal import RunState
from nkat_ray.search.rows import curve_rows, training_share, trial_rows, trial_start_s

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
    tables.write_trials(folder / TRIALS_FILE, trial_rows(state, config), metadata=about)
    tables.write_curves(folder / CURVES_FILE, curve_rows(state), metadata=about)
    tables.write_stage2(folder / STAGE2_FILE, stage2_rows(state), metadata=about)


def stage2_rows(state: RunState) -> list[dict[str, Any]]:
    """Rows of stage2.parquet: tested where they have been, else as validated."""
    return [state.tested.get(key, row) for key, row in sorted(state.stage2.items())]


def summarise(config: RunConfig, state: RunState, data: Mapping[str, Any], code: int | None) -> dict[str, Any]:
    """summary.json (docs/spec.md section 8); `data` is `describe_data`'s, a code of None means that the run goes on."""
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
        "stop_reasons": results.stop_counts(trials),
        "survivors": survivors,
        "winner": None if winner is None else _winner(winner, trials, rows),
        "targets": GLOBAL_TARGETS,
        "notices": state.notices,
        "training_share": training_share(state),
        "trial_start_s": trial_start_s(state),
        "wall_s": state.wall_s,
        "versions": versions(),
        "exit_code": code,
    }
    verdict = results.verdict_of(summary, rows)
    return {**summary, "verdict": verdict.status, "verdict_sentence": verdict.sentence}


def _winner(trial: int, trials: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    row = next(row for row in trials if row["trial"] == trial)
    scores = results.result_scores(rows, trial)
    mine = {r["dataset"]: r for r in rows if r["trial"] == trial}  # datasets of one's own too
    return {
        "trial": trial,
        "config": tables.config_of(row),
        "seed": row["seed"],
        "lambda_theory": row["lambda_theory"],
        "val_global_tpe": results.validation_scores(rows, trial).global_tpe,
        **asdict(scores),
        "global_tpe_interval": results.global_interval(rows, trial),
        "global_tpe_by_model": results.global_tpe_by_model(rows, trial),
        "counted": results.datasets_counted(rows, trial),
        "datasets": {
            name: {"accuracy": r["test_accuracy"], "tpe": r["tpe"], "n": r["n_test"], "status": r["status"]}
            for name, r in mine.items()
        },
    }


def versions() -> dict[str, str]:
    """Versions of what computed the figures."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"nkat_ray": __version__, "python": platform.python_version(), **found}


def data_phrase(datasets: Mapping[str, Dataset | Missing]) -> str:
    """One phrase for people on where the images come from."""
    parts = [f"{name} {'MISSING' if isinstance(d, Missing) else d.source}" for name, d in datasets.items()]
    return "; ".join(parts)


def print_report(folder: Path, screen: Screen) -> None:
    """The report of a run on the terminal, from its files."""
    summary, stage2 = tables.read_summary(folder / SUMMARY_FILE), tables.read_stage2(folder / STAGE2_FILE)
    final_report(summary, tables.read_trials(folder / TRIALS_FILE), stage2, screen, folder=folder)
    screen.conclude({**summary, "folder": folder.absolute()}, result_lines(summary, stage2, folder))
